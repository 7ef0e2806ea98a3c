"""The URL to which `run_batch` hands a whole batch over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.server_args import ServerArgs

RUN_PATH = "/batchllm/run"


def add_run_route(server_args: ServerArgs, *_: Any, **__: Any) -> None:
    """Runs before SGLang sets its HTTP server up, so that the API key guards the route too.

    ``GET`` says how many requests the server runs at a time. ``POST`` to ``/{batch}`` takes lines
    of `exchange.request_line`, and answers with lines of `exchange.answer_line` in the order in
    which requests finish; see `HandOver.answers` for when it ends. When the client closes the
    connection, what remains is aborted. ``POST`` to ``/{batch}/ended`` takes the programs that send
    no more requests, see `channel.Channel.end_programs`.
    """
    if not getattr(server_args, "batchllm", False):
        return
    from sglang.srt.entrypoints import http_server
    from starlette.background import BackgroundTask
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse

    from sglang_batchllm.frontend.handover import HandOver, end_programs

    def manager() -> TokenizerManager:
        return http_server.get_global_state().tokenizer_manager  # type: ignore[return-value]

    async def describe() -> dict[str, int]:
        return await limits(manager())

    async def run(request: Request) -> Response:
        unread = b""
        try:
            handover = HandOver(manager(), request.path_params["batch"])
            async for chunk in request.stream():
                *lines, unread = (unread + chunk).split(b"\n")
                await handover.add(lines)
        except ClientDisconnect:
            return Response()
        except (ValueError, KeyError, TypeError) as error:
            return JSONResponse({"error": {"message": f"not a hand-over: {error!r}"}}, 400)
        await handover.start()
        return StreamingResponse(
            handover.answers(),
            media_type="application/x-ndjson",
            background=BackgroundTask(handover.abandon),
        )

    async def ended(batch: str, programs: dict[int, bool]) -> None:
        end_programs(manager(), batch, programs)

    http_server.app.add_api_route(RUN_PATH, describe, methods=["GET"])
    http_server.app.add_route(RUN_PATH + "/{batch}", run, methods=["POST"])
    http_server.app.add_api_route(RUN_PATH + "/{batch}/ended", ended, methods=["POST"])


async def limits(manager: TokenizerManager) -> dict[str, int]:
    """What a client has to know of the server."""
    states = await manager.get_internal_state()
    return {"max_running_requests": states[0]["effective_max_running_requests_per_dp"]}
