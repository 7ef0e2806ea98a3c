"""Reading a form whose file may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from sglang_batchllm.server.batches.errors import ApiError

MAX_FIELDS_BYTES = 64 << 10
"""All headers and fields of a form but its file."""


@dataclass
class Form:
    """fields: by name. filename: of the file, once its part has begun."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


class FormReader:
    """Takes a ``multipart/form-data`` body in chunks. The bytes of its part ``file`` go to `sink`.

    Raises ApiError (400), when it is made and in `feed` and `finish`, for what is no such form.
    """

    def __init__(self, content_type: str, sink: Callable[[bytes], None]):
        self.form = Form()
        self._sink = sink
        self._room = MAX_FIELDS_BYTES
        self._header = [bytearray(), bytearray()]  # name and value
        self._disposition = b""
        self._name: str | None = None  # of the field that the part is, None for the file
        self._value = bytearray()
        self._ended = False
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise ApiError(400, "the body is multipart/form-data with the parts purpose and file")
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._add(0, data[start:end]),
                    "on_header_value": lambda data, start, end: self._add(1, data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._take,
                    "on_part_end": self._end,
                    "on_end": self._end_form,
                },
            )
        except FormParserError as error:
            raise _malformed(error) from None

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _malformed(error) from None

    def finish(self) -> Form:
        if not self._ended:
            raise ApiError(400, "the form ends before its last boundary")
        if self.form.filename is None:
            raise ApiError(400, "file is missing: a part of the form with a filename", param="file")
        return self.form

    def _begin(self) -> None:
        self._disposition = b""
        self._value.clear()

    def _add(self, which: int, piece: bytes) -> None:
        self._spend(len(piece))
        self._header[which] += piece

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _end_headers(self) -> None:
        options = parse_options_header(self._disposition)[1]
        name = _text(options.get(b"name", b""))
        if name == "file" and b"filename" in options:
            if self.form.filename is not None:
                raise ApiError(400, "a form has one file", param="file")
            self.form.filename = _text(options[b"filename"])
            self._name = None
        else:
            self._name = name

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            self._sink(data[start:end])
        else:
            self._spend(end - start)
            self._value += data[start:end]

    def _end(self) -> None:
        if self._name is not None:
            self.form.fields[self._name] = _text(bytes(self._value))

    def _end_form(self) -> None:
        self._ended = True

    def _spend(self, num_bytes: int) -> None:
        self._room -= num_bytes
        if self._room < 0:
            raise ApiError(413, f"the form without its file is at most {MAX_FIELDS_BYTES} bytes")


def _malformed(error: FormParserError) -> ApiError:
    return ApiError(400, f"the body is no valid multipart/form-data: {error}")


def _text(data: bytes) -> str:
    return data.decode(errors="replace")
