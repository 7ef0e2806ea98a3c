"""`write_page`: whole, safe and bounded as a file, and what a real browser makes of it."""

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompts import mixed_batch
from sglang_batchllm.jobs import page
from sglang_batchllm.planning import BatchPlan, plan_batch

NASTY = "</script><script>window.broken=1</script><!--<script> \u2028\u2029\0 \"'\\`${1}& \ud800 é𝄞"


def write(
    path: Path,
    plan: BatchPlan,
    prompts: Sequence[Sequence[int]],
    word: str = "w{}",
    title: str = "A batch",
) -> dict[str, Any]:
    """Write a page whose token i reads as `word` with i, and return what is embedded in it."""
    page.write_page(
        path,
        plan,
        lambda request, start, end: np.array(prompts[request][start:end]),
        lambda ids: " ".join(word.replace("{}", str(token)) for token in ids),
        lambda request: f"r{request}",
        title,
    )
    return embedded(path)


def embedded(path: Path) -> dict[str, Any]:
    before, _, after = path.read_text(encoding="utf-8").partition(
        'type="application/json" id="plan">'
    )
    assert before and "__PLAN__" not in after
    return json.loads(after[: after.index("</script>")])


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "page.html", plan_batch([[1, 2], [1, 3]]), [[1, 2], [1, 3]])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|\bsrc\s*=|\bhref\s*=|url\(|@import|\bimport\b|fetch\(", text)
    assert "default-src 'none'" in text  # and the browser holds it to that


def test_texts_cannot_leave_their_place(tmp_path: Path) -> None:
    prompts = [[1, 2], [1, 3]]
    plain, nasty = tmp_path / "plain.html", tmp_path / "nasty.html"
    write(plain, plan_batch(prompts), prompts)
    data = write(nasty, plan_batch(prompts), prompts, NASTY, NASTY)
    tags = re.compile(r"<[/!a-z]")
    assert tags.findall(nasty.read_text(encoding="utf-8")) == tags.findall(
        plain.read_text(encoding="utf-8")
    )
    shown = NASTY.replace("\ud800", "\ufffd")
    assert data["title"] == data["blocks"][1]["text"] == shown


@pytest.mark.parametrize("most", [12, 60, 5_000])
@pytest.mark.parametrize("page_size", [1, 4])
def test_blocks_hold_the_whole_batch(
    most: int, page_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few blocks there may be, no request, token or saving is lost or counted twice."""
    monkeypatch.setattr(page, "MAX_BLOCKS", most)
    prompts = mixed_batch(seed=random.randrange(10**6))
    outputs = [random.randint(1, 50) for _ in prompts]  # mixes subtrees and single requests
    plan = plan_batch(prompts, page_size, outputs)
    data = write(tmp_path / "page.html", plan, prompts)
    blocks = data["blocks"]

    assert len(blocks) <= most
    assert blocks[0]["parent"] == -1 and blocks[0]["requests"] == len(prompts)
    ends = [block["first"] + block.get("ends", 0) for block in blocks]  # of the rows filled
    tokens = 0.0
    for index, block in enumerate(blocks):
        named = plan.order[block["first"] :][: min(block["requests"], 5)]
        assert block["names"] == [f"r{i}" for i in named]
        if index:
            assert block["parent"] < index and block["start"] == blocks[block["parent"]]["end"]
            assert block["first"] == ends[block["parent"]]
            ends[block["parent"]] += block["requests"]
        if "branches" in block:
            ends[index] += block["requests"]
            bounds = np.linspace(0, block["requests"], len(block["profile"][2]) + 1).astype(int)
            tokens += float(np.diff(bounds) @ block["profile"][2])
            assert all(a <= b <= c for a, b, c in zip(*block["profile"], strict=True))
        else:
            tokens += block["requests"] * (block["end"] - block["start"])
        # Text, from where the block begins.
        if index:
            prompt = prompts[plan.order[block["first"]]][block["start"] : block["end"]]
            assert block["text"] == " ".join(f"w{token}" for token in prompt)
    assert ends == [block["first"] + block["requests"] for block in blocks]
    assert tokens == pytest.approx(plan.report.prompt_tokens, abs=0.05 * len(prompts))
    assert sum(block["saved"] for block in blocks) == plan.report.tokens_saved

    shown = [block for block in blocks if "group" in block]
    for block in shown:
        assert block["members"] == plan.groups.size[block["group"]]
        assert block["prefix"] == plan.groups.prefix_len[block["group"]]
    if most == 5_000:
        assert not any("branches" in block for block in blocks)
        assert sorted(block["group"] for block in shown) == list(range(len(plan.groups.size)))
    longest = max(map(len, prompts))
    assert data["figures"]["deepest_kv_tokens"] == -(-longest // page_size) * page_size
    assert data["figures"]["tokens_saved"] == plan.report.tokens_saved


def test_a_large_batch_stays_a_small_page(tmp_path: Path) -> None:
    rng = random.Random(0)
    prompts = []
    for document in range(3_000):
        body = [document, *range(50)]
        prompts += [body + [rng.randrange(10**6) for _ in range(5)] for _ in range(7)]
    data = write(tmp_path / "page.html", plan_batch(prompts), prompts, word="word number {}")
    assert page.MAX_BLOCKS / 2 < len(data["blocks"]) <= page.MAX_BLOCKS
    assert (tmp_path / "page.html").stat().st_size < 5e6
    assert max(block["requests"] for block in data["blocks"] if "branches" in block) > 500


def test_suffixes_of_one_prefix_are_one_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MAX_BLOCKS", 30)
    prompts = [[1, 2, 3] + [10 + i] * (1 + i % 45) for i in range(4_980)]
    blocks = write(tmp_path / "page.html", plan_batch(prompts), prompts)["blocks"]
    (rest,) = (block for block in blocks if "branches" in block)
    assert rest["branches"] == rest["requests"] == 4_980 - sum(b["requests"] == 1 for b in blocks)
    assert rest["shared"] == 0 and rest["median"] == 23 and rest["longest"] == 45


def test_long_texts_are_cut_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "TEXT_TOKENS", 100)
    prompts = [[*range(300), 1000], [*range(300), 1001], [7, 8]]
    blocks = write(tmp_path / "page.html", plan_batch(prompts), prompts)["blocks"]
    cut = [block for block in blocks if block.get("cut")]
    assert [block["requests"] for block in cut] == [2]
    assert cut[0]["text"] == " ".join(f"w{token}" for token in range(96))  # 4 are of the others
    spaces = write(tmp_path / "page.html", plan_batch(prompts), prompts, word=" " * 200)["blocks"]
    assert all(block["cut"] for block in spaces if block["requests"] == 2)
    assert sum(len(block.get("text", "")) for block in spaces) <= 8 * 4 * 100


@pytest.mark.parametrize("prompts", [[], [[5]], [[5, 6]] * 3])
def test_smallest_batches(prompts: list[list[int]], tmp_path: Path) -> None:
    blocks = write(tmp_path / "page.html", plan_batch(prompts), prompts)["blocks"]
    assert [block["requests"] for block in blocks] == [len(prompts)] * len(blocks)
    assert len(blocks) == 1 + bool(prompts)


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Browser:
    """Headless Chromium, driven over its debugging pipe: JSON messages that end in NUL."""

    def __init__(self, folder: Path):
        to_it, mine = os.pipe()
        its, from_it = os.pipe()
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
        options += ("--window-size=1400,900", f"--user-data-dir={folder}")
        start = f'exec "$@" 3<&{to_it} 4>&{from_it}'
        self.process = subprocess.Popen(
            ["bash", "-c", start, "bash", str(CHROMIUM), *options],
            pass_fds=(to_it, from_it),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_it)
        os.close(from_it)
        self._write, self._read = os.fdopen(mine, "wb", 0), os.fdopen(its, "rb")
        self._waiting, self._last = b"", 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            got = os.read(self._read.fileno(), 1 << 16)
            assert got, "the browser has ended"
            self._waiting += got
        message, self._waiting = self._waiting.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params, **self._session}
        self._write.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path) -> None:
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        self.run("new Promise(requestAnimationFrame)")

    def run(self, script: str) -> Any:
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def mouse(self, kind: str, block: str, **more: Any) -> None:
        """An event of the mouse in the middle of a block."""
        middle = "({x: box.x + x + wide / 2, y: box.y + y + tall / 2})"
        middle = f"(({{x, y, wide, tall}}, box) => {middle})"
        at = self.run(f"{middle}(frameOf({block}), canvas.getBoundingClientRect())")
        self.call("Input.dispatchMouseEvent", type=kind, **at, **more)

    def click(self, block: str, times: int = 1) -> None:
        for count in range(1, times + 1):
            self.mouse("mousePressed", block, button="left", clickCount=count)
            self.mouse("mouseReleased", block, button="left", clickCount=count)
        self.run("new Promise((done) => setTimeout(done, 400))")  # a zoom takes 220 ms

    def key(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)
        self.run("new Promise((done) => setTimeout(done, 400))")

    def complaints(self) -> list[dict[str, Any]]:
        """Errors, whatever is written to the console, and requests beyond the page itself."""
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        asked = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [event for event in self.events if event["method"] in bad] + asked[1:]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here to show the page; on Debian: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.call("Browser.close")
    browser.process.wait(30)


def test_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    prompts = [[1, 2, 3, *([text] * 40), question] for text in (5, 6) for question in range(9)]
    prompts += [[9, question] for question in range(6)]
    write(tmp_path / "page.html", plan_batch(prompts), prompts, NASTY, "Title " + NASTY)
    browser.open(tmp_path / "page.html")
    assert browser.run("window.broken") is None
    assert browser.run("document.title").startswith("Title </script>")
    assert browser.run("$('figures').innerText").split("\n")[1] == "24"
    assert browser.run("context.getImageData(0, 0, 900, 500).data.some((byte) => byte)")

    group = "blocks.find((block) => block.group === 0)"
    browser.mouse("mouseMoved", group)
    assert "requests × " in browser.run("$('tip').innerText")
    browser.click(group)
    assert "Group 1 of" in browser.run("$('panel').innerText")
    assert "window.broken=1" in browser.run("$('panel').innerText")
    browser.click(group, times=2)
    assert browser.run(f"focus === {group}")
    assert browser.run("$('path').querySelectorAll('button').length") > 1
    browser.key("Escape", 27)
    assert browser.run(f"focus === {group}.up")
    browser.run("$('path').querySelector('button').click()")
    assert browser.run("focus === root")

    browser.run("canvas.focus(); choose(root)")
    browser.key("ArrowRight", 39)
    assert browser.run("chosen === root.children[0]")
    browser.key("ArrowDown", 40)
    assert browser.run("chosen === root.children[1]")
    browser.key("Enter", 13)
    assert browser.run("focus === root.children[1]")

    browser.key("/", 191)
    assert browser.run("document.activeElement.id") == "search"
    browser.call("Input.insertText", text="R23")
    assert browser.run("$('count').textContent") == "1 bar"
    browser.key("Enter", 13)
    assert browser.run("$('panel').innerText").count("r23") == 1
    assert not browser.complaints()


@pytest.mark.parametrize("prompts", [[], [[5]], [[5, 6]] * 3])
def test_smallest_batches_in_a_browser(
    browser: Browser, prompts: list[list[int]], tmp_path: Path
) -> None:
    write(tmp_path / "page.html", plan_batch(prompts), prompts)
    browser.open(tmp_path / "page.html")
    assert browser.run("blocks.length") == 1 + bool(prompts)
    browser.run("$('outline').open = true; draw()")
    assert not browser.complaints()


def test_many_blocks_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    prompts = [[1, *([document] * 20), 10**6 + i] for document in range(2_000) for i in range(9)]
    write(tmp_path / "page.html", plan_batch(prompts), prompts)
    browser.open(tmp_path / "page.html")
    browser.run("zoomTo(blocks[50]); new Promise((done) => setTimeout(done, 400))")
    browser.run("$('search').value = 'w7'; search(); goTo(1)")
    assert browser.run("matches.length") > 100
    assert not browser.complaints()
