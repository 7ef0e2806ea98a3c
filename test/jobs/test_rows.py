"""What a row may be, and what is said of any other."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from pretended_server import Script, answers_in, records_in, request, run
from sglang_batchllm.jobs import blocks, rows
from sglang_batchllm.jobs.errors import RowError
from sglang_batchllm.jobs.job import Files
from sglang_batchllm.jobs.rows import Rules
from sglang_batchllm.wire.lines import CHAT, COMPLETIONS

SAY = [{"role": "user", "content": "say"}]
OBJECT = "it must be an object with custom_id, method, url, body"
TEXT = "it must be a text that is not empty"
CHAT_OR = "it must be /v1/chat/completions or /v1/completions"


def line(drop: str | None = None, **fields: Any) -> bytes:
    whole = {"custom_id": "x", "method": "POST", "url": CHAT, "body": {"model": "pretended"}}
    whole["body"] |= {"messages": SAY}
    whole |= fields
    whole.pop(drop or "", None)
    return json.dumps(whole).encode()


def body(**fields: Any) -> bytes:
    return line(body={"model": "pretended", "messages": SAY, **fields})


def nested(depth: int) -> bytes:
    """A good row but for something that is nested so deeply in its body."""
    inside = b"[" * depth + b"]" * depth
    return body(extra="HERE").replace(b'"HERE"', inside)


BAD = [
    (b"no json", "invalid_json", "the line is not JSON: invalid literal, expected 'null': line 1 "
     "column 1 (char 0)"),
    (line()[:-1], "invalid_json", "the line is not JSON: unexpected end of data: line 1 column "
     "149 (char 148)"),
    (line()[:20], "invalid_json", "the line is not JSON: unexpected end of data: line 1 column "
     "21 (char 20)"),
    (line() + b"}", "invalid_json", "the line is not JSON: unexpected content after document: "
     "line 1 column 150 (char 149)"),
    (line() + line(), "invalid_json", "the line is not JSON: unexpected content after document: "
     "line 1 column 150 (char 149)"),
    (line(body={"n": float("nan")}), "invalid_json", "the line is not JSON: unexpected "
     "character, expected a JSON value: line 1 column 83 (char 82)"),
    (b"{'custom_id': 'x'}", "invalid_json", "the line is not JSON: unexpected character, "
     "expected a string key: line 1 column 2 (char 1)"),
    (b'{"custom_id": "\\ud800"}', "invalid_json", "the line is not JSON: no low surrogate in "
     "string: line 1 column 16 (char 15)"),
    (b'{"custom_id": "a\x01"}', "invalid_json", "the line is not JSON: unexpected control "
     "character in string: line 1 column 17 (char 16)"),
    (b"[" * 5000, "invalid_json", "the line is not JSON: depth limit exceeded: line 1 column "
     "1026 (char 1025)"),
    (codecs.BOM_UTF8, "invalid_json", "the line is not JSON: Input is a zero-length, empty "
     "document: line 1 column 1 (char 0)"),
    (nested(253), "invalid_json", "the line is nested more than 250 deep"),
    (nested(1000), "invalid_json", "the line is nested more than 250 deep"),
    (line(custom_id="y").replace(b'"say"', b'"s\xffy"'), "invalid_encoding",
     "the line is not UTF-8 from byte 143 on"),
    (line().decode().encode("utf-16"), "invalid_encoding",
     "the line is not UTF-8 from byte 1 on"),
    (b'{"custom_id": "\xed\xa0\x80"}', "invalid_encoding",
     "the line is not UTF-8 from byte 16 on"),
    (b"7", "invalid_request", f"the line is 7; {OBJECT}"),
    (b"[1, 2]", "invalid_request", f"the line is a list; {OBJECT}"),
    (b"null", "invalid_request", f"the line is null; {OBJECT}"),
    (b'"text"', "invalid_request", f'the line is "text"; {OBJECT}'),
    (b'"%s"' % (b"long" * 50), "invalid_request",
     f'the line is "{("long" * 50)[:79]}...; {OBJECT}'),
    (b"{}", "invalid_request", "custom_id is missing; give each request one of its own"),
    (line("custom_id"), "invalid_request",
     "custom_id is missing; give each request one of its own"),
    (line(custom_id=""), "invalid_request", f'custom_id is ""; {TEXT}'),
    (line(custom_id=None), "invalid_request", f"custom_id is null; {TEXT}"),
    (line(custom_id=5), "invalid_request", f"custom_id is 5; {TEXT}"),
    (line(custom_id=10**30), "invalid_request", f"custom_id is 1e+30; {TEXT}"),
    (line(custom_id=["x"]), "invalid_request", f"custom_id is a list; {TEXT}"),
    (line(method="GET"), "invalid_method", 'method is "GET"; it must be POST'),
    (line(method="post"), "invalid_method", 'method is "post"; it must be POST'),
    (line(method=None), "invalid_method", "method is null; it must be POST"),
    (line(url="/v1/embeddings"), "invalid_url", f'url is "/v1/embeddings"; {CHAT_OR}'),
    (line("url"), "invalid_url", f"url is null; {CHAT_OR}"),
    (line(url=5), "invalid_url", f"url is 5; {CHAT_OR}"),
    (line(url=[CHAT]), "invalid_url", f"url is a list; {CHAT_OR}"),
    (line(url="http://elsewhere" + CHAT), "invalid_url",
     f'url is "http://elsewhere{CHAT}"; {CHAT_OR}'),
    (line("body"), "invalid_request", "body is null; it must be an object"),
    (line(body=[]), "invalid_request", "body is a list; it must be an object"),
    (line(body="say"), "invalid_request", 'body is "say"; it must be an object'),
    (line(body={"model": "pretended"}), "invalid_request",
     "body has no messages, which /v1/chat/completions needs"),
    (line(body={"model": "pretended", "prompt": "say"}), "invalid_request",
     "body has no messages, which /v1/chat/completions needs"),
    (line(url=COMPLETIONS), "invalid_request",
     "body has no prompt, which /v1/completions needs"),
    (body(stream=True), "invalid_request",
     "body has stream; a batch has whole answers only"),
    (body(model="other"), "invalid_model", 'model is "other"; served is pretended'),
    (body(model="other:lora"), "invalid_model", 'model is "other:lora"; served is pretended'),
    (body(model=""), "invalid_model", 'model is ""; served is pretended'),
    (body(model=7), "invalid_model", "body.model is 7; name a model"),
    (body(model={"name": "m"}), "invalid_model", "body.model is an object; name a model"),
]  # fmt: skip
"""A line, and the code and message of its record."""

RULES = Rules(models=["pretended"])


@pytest.mark.parametrize(("text", "code", "message"), BAD)
def test_a_bad_row_is_told_what_is_wrong(text: bytes, code: str, message: str):
    with pytest.raises(RowError) as caught:
        RULES.read(text)
    assert (caught.value.code, str(caught.value)) == (code, message)


def test_a_bad_row_says_who_it_is_where_that_can_be_read():
    for text in (body(stream=True), line("body"), line(method="GET"), body(model="other")):
        with pytest.raises(RowError) as caught:
            RULES.read(text)
        assert caught.value.custom_id == "x"
    with pytest.raises(RowError) as caught:
        RULES.read(line()[:-1])
    assert caught.value.custom_id is None


@pytest.mark.parametrize(
    ("rules", "text", "code", "message"),
    [
        (Rules(models=[]), body(model=None), "invalid_model", "body.model is null; name a model"),
        (
            Rules(models=["a", "b"]),
            body(model="c"),
            "invalid_model",
            'model is "c"; served is a or b',
        ),
        (
            Rules(models=["pretended"], urls=(COMPLETIONS,)),
            line(),
            "invalid_url",
            f'url is "{CHAT}"; it must be /v1/completions',
        ),
        (
            Rules(models=["pretended"], urls=(CHAT,)),
            line(url=COMPLETIONS),
            "invalid_url",
            f'url is "{COMPLETIONS}"; it must be /v1/chat/completions',
        ),
    ],
)
def test_rules_narrow_what_a_row_may_be(rules: Rules, text: bytes, code: str, message: str):
    with pytest.raises(RowError) as caught:
        rules.read(text)
    assert (caught.value.code, str(caught.value)) == (code, message)


def test_a_line_that_is_too_long_says_how_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", len(line()))
    assert RULES.read(line())
    with pytest.raises(RowError) as caught:
        RULES.read(line() + b" ")
    assert caught.value.code == "too_long"
    most = len(line())
    assert str(caught.value) == f"the line has {most + 1} bytes; a request has at most {most}"


@pytest.mark.parametrize(
    "text",
    [
        line(),
        line("method"),
        codecs.BOM_UTF8 + line(),
        b"  " + line() + b" \t",
        line(extra={"anything": 1}),
        line(custom_id="\u00e9 \U0001d11e"),
        line(custom_id=" "),
        body(stream=False),
        body(stream=None),
        body(model="pretended:lora"),
        body(model=None),
        body(seed=10**30),
        body(messages=None),
        body(messages="say"),
        body(messages=[5]),
        body(messages=[]),
        nested(200),
        line(url=COMPLETIONS, body={"prompt": "say"}),
        line(url=COMPLETIONS, body={"prompt": [1, 2], "echo": True}),
    ],
)
def test_what_is_for_the_server_to_judge_is_accepted(text: bytes):
    row = RULES.read(text)
    assert row.body["model"].startswith("pretended")
    assert "stream" not in row.body


def test_parameters_fill_what_a_body_does_not_say():
    rules = Rules(models=["pretended"], params={"max_tokens": 5, "temperature": 0})
    row = rules.read(body(max_tokens=7, stream_options={"include_usage": True}))
    assert row.body == {
        "model": "pretended",
        "messages": SAY,
        "max_tokens": 7,
        "temperature": 0,
    }


@pytest.mark.parametrize("ours", [None, 8])
@pytest.mark.parametrize("files", [1, 2])
def test_bad_rows_fail_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: int | None, files: int
):
    """Each has one record with its line and message, and its neighbours are answered."""
    for module in (rows, blocks):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 20_000)
    long = request("long", "x" * 30_000).rstrip()
    cases = [(text, code, message) for text, code, message in BAD if b"\n" not in text]
    cases.append((long, "too_long", f"the line has {len(long)} bytes; a request has at most 20000"))
    paths = [tmp_path / f"in{i}.jsonl" for i in range(files)]
    expected, good = [], []
    for number, path in enumerate(paths):
        data, at = codecs.BOM_UTF8, 0
        for i, (text, code, message) in enumerate(cases):
            if i % 5 == 3:
                data, at = data + b"\n  \r\n", at + 2  # blank lines count
            neighbour = f"{number}-{i}"
            data += request(neighbour) + text + (b"\r\n" if i % 2 else b"\n")
            good.append(neighbour)
            at += 2
            expected.append((str(path) if files > 1 else None, at, code, message))
        again = f"line 1{f' of {paths[0]}' if files > 1 else ''} has this custom_id, too; give"
        data += request("0-0").rstrip()  # and no end of the line
        message = f"{again} each request one of its own"
        expected.append((str(path) if files > 1 else None, at + 1, "duplicate_custom_id", message))
        path.write_bytes(data)
    output = tmp_path / "out.jsonl"
    script = Script(ours=ours)
    status = run(Files(tuple(paths), output), script)
    errors = [record["error"] for record in records_in(output) if record["error"]]
    told = [(error.get("file"), error["line"], error["code"], error["message"]) for error in errors]
    assert sorted(told, key=str) == sorted(expected, key=str)
    answered = [r["custom_id"] for r in records_in(output) if r["response"] is not None]
    assert sorted(answered) == sorted(good)
    assert (status.done, status.failed, status.total) == (
        len(good),
        len(expected),
        len(good) + len(expected),
    )
    before = output.read_bytes()
    again_status = run(Files(tuple(paths), output), script)
    assert output.read_bytes() == before
    assert again_status.found == again_status.total
    assert script.starts == 1


def test_errors_go_to_a_file_of_their_own(tmp_path: Path):
    path, output, errors = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "bad.jsonl"))
    path.write_bytes(request("a") + b"no json\n" + request("b") + request("c"))
    files = Files((path,), output, errors)
    run(files, Script(replies={"b": [400]}))
    assert answers_in(output) == {"a": "<a>", "c": "<c>"}
    by_id = {record["custom_id"]: record for record in records_in(errors)}
    assert by_id.keys() == {None, "b"}
    assert by_id[None]["error"]["line"] == 2
    assert by_id["b"]["response"]["status_code"] == 400
    assert by_id["b"]["response"]["body"] == {"error": {"message": "status 400"}}
    script = Script()
    assert run(files, script).found == 4
    assert script.starts == 0
