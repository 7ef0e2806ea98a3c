"""Reading a form, however it is cut into chunks."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sglang_batchllm.server.batches.errors import ApiError
from sglang_batchllm.server.batches.multipart import MAX_FIELDS_BYTES, Form, FormReader

KIND = "multipart/form-data; boundary=BOUND"


def part(disposition: str, content: bytes) -> bytes:
    head = f"--BOUND\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
    return head.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--BOUND--\r\n"


PURPOSE = part('name="purpose"', b"batch")


def read(chunks: Sequence[bytes], kind: str = KIND) -> tuple[Form, bytes]:
    pieces: list[bytes] = []
    reader = FormReader(kind, pieces.append)
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish(), b"".join(pieces)


@given(st.binary(), st.lists(st.integers(0, 400)), st.booleans())
def test_cuts_change_nothing(content: bytes, cuts: list[int], file_first: bool):
    content = b"\r\n--BOUN" + content
    assume(b"\r\n--BOUND" not in content)
    file = part('name="file"; filename="naïve ü.jsonl"', content)
    data = form(file, PURPOSE) if file_first else form(PURPOSE, file)
    ends = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    chunks = [data[start:end] for start, end in itertools.pairwise(ends)]
    found, received = read(chunks)
    assert found == Form({"purpose": "batch"}, "naïve ü.jsonl")
    assert received == content


FILE = part('name="file"; filename="a"', b"x")

BAD = {
    "no form": ("application/json", b"{}", "the body is multipart/form-data with the parts"),
    "no boundary": ("multipart/form-data", b"", "the body is multipart/form-data with the parts"),
    "long boundary": (
        f"multipart/form-data; boundary={'x' * 300}",
        b"",
        "the body is no valid multipart/form-data: Boundary length 300 exceeds maximum of",
    ),
    "not a form": (KIND, b"hello", "the body is no valid multipart/form-data: "),
    "empty": (KIND, b"", "the form ends before its last boundary"),
    "cut": (KIND, form(PURPOSE, FILE)[:-6], "the form ends before its last boundary"),
    "no file": (KIND, form(PURPOSE), "file is missing: a part of the form with a filename"),
    "file as field": (
        KIND,
        form(PURPOSE, part('name="file"', b"x")),
        "file is missing: a part of the form with a filename",
    ),
    "two files": (KIND, form(FILE, FILE), "a form has one file"),
    "long field": (
        KIND,
        form(part('name="a"', b"x" * 70_000)),
        f"the form without its file is at most {MAX_FIELDS_BYTES} bytes",
    ),
    "many fields": (
        KIND,
        form(*[part('name="a"', b"x" * 100)] * 1000),
        f"the form without its file is at most {MAX_FIELDS_BYTES} bytes",
    ),
    "long header": (
        KIND,
        form(part(f'name="{"x" * 70_000}"', b"x")),
        "the body is no valid multipart/form-data: Maximum header size exceeded",
    ),
}


@pytest.mark.parametrize(("kind", "data", "message"), BAD.values(), ids=BAD)
def test_what_is_no_form_is_refused(kind: str, data: bytes, message: str):
    with pytest.raises(ApiError) as caught:
        read([data], kind)
    assert caught.value.message.startswith(message)
