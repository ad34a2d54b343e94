"""The web page in headless Chromium: chats, keys, keyboard, narrow screens, and texts that would like to be markup."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")
sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")

from dummy_engine import WATCHDOG  # noqa: E402
from server_rig import running, until  # noqa: E402

from hybrid import LLM  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
ANSWER = """# A *title*

Some **bold** text, `code`, <img src=x onerror="document.title='owned'"> and [a link](https://example.org/),
[none](javascript:alert(1)).

- one
- two
  1. inner

| a | b |
|---|--:|
| 1 | 2 |

```python
print("<b>hello</b>")
```
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, request) -> Iterator[sync_api.Page]:
    """Fails for whatever the browser complains of, such as what the policy forbids."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(20_000)
    complaints: list[str] = []
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    page.close()
    allowed = ("401", "net::ERR_")  # a key that is missing, a server that ends
    assert not [text for text in complaints if not any(word in text for word in allowed)]


def ready(page: sync_api.Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("[data-state=ready]")


def answer(page: sync_api.Page, number: int = 1) -> sync_api.Locator:
    """The answer of this number, once it is complete."""
    found = page.locator(".assistant").nth(number - 1)
    found.get_by_role("button", name="Answer again").wait_for()
    return found


def test_a_chat_goes_on_is_edited_and_is_forgotten(page, server) -> None:
    ready(page, server.address)
    page.get_by_label("Message", exact=True).type("Tell me of a fox.")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("And a bee.")
    page.keyboard.press("Enter")
    assert answer(page).locator(".said").inner_text()
    assert page.locator(".user .text").inner_text() == "Tell me of a fox.\nAnd a bee."
    page.keyboard.type("And then?")  # the field has the focus again
    page.keyboard.press("Enter")
    stats = answer(page, 2).locator(".stats").inner_text()
    assert "tokens/s" in stats and not stats.split(" · ")[-1].startswith("0 of"), stats
    page.reload()
    assert page.locator("#messages > li").count() == 4
    page.locator(".user").first.get_by_role("button").click()
    page.get_by_role("textbox", name="Edit this message").fill("Something else")
    page.keyboard.press("Enter")
    answer(page)
    assert page.locator("#messages > li").count() == 2
    answer(page).get_by_role("button", name="Answer again").click()
    answer(page)
    assert page.locator("#messages > li").count() == 2
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#messages > li").count() == 0 and page.locator("#empty").is_visible()


def test_escape_stops_and_frees_the_place(page, server) -> None:
    ready(page, server.address)
    begun, over = threading.Event(), threading.Event()
    step = threading.Thread(target=lambda: server.service.llm.llm.run(lambda: (begun.set(), over.wait(WATCHDOG))))
    step.start()
    begun.wait()  # the engine is busy, and nothing is answered meanwhile
    page.get_by_label("Message", exact=True).fill("Go on")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    until(lambda: server.service.taken == 1)
    page.keyboard.press("Escape")
    assert answer(page).locator(".stats").inner_text() == "stopped"
    until(lambda: server.service.taken == 0)
    over.set()
    step.join()


def test_after_answers_that_were_stopped_the_roles_still_alternate(page, server) -> None:
    """Whether there was something of an answer, only reasoning, nothing yet, or an error."""
    deltas: list[dict[str, str]] = []
    sent: list[list[dict[str, str]]] = []

    def reply(route: sync_api.Route) -> None:
        sent.append(route.request.post_data_json["messages"])
        chunks = "".join(f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n" for delta in deltas)
        if deltas:
            return route.fulfill(body=f"{chunks}data: [DONE]\n\n", content_type="text/event-stream")
        return route.abort()

    page.route("**/v1/chat/completions", reply)
    ready(page, server.address)
    for number, part in enumerate(
        ({"content": "one"}, None, {"reasoning_content": "Hm"}, {"content": " "}, {"content": "five"})
    ):
        deltas[:] = [part] if part else []
        page.get_by_label("Message", exact=True).fill(f"question {number}")
        page.keyboard.press("Enter")
        answer(page, number + 1)
    assert [[message["role"] for message in messages] for messages in sent[:2]] == [
        ["user"],
        ["user", "assistant", "user"],
    ]
    assert sent[-1] == [
        {"role": "user", "content": "question 0"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "question 1\n\nquestion 2\n\nquestion 3\n\nquestion 4"},
    ]


def test_an_answer_that_was_stopped_before_it_began_has_its_question_asked_with_the_next(page, server) -> None:
    ready(page, server.address)
    begun, over = threading.Event(), threading.Event()
    step = threading.Thread(target=lambda: server.service.llm.llm.run(lambda: (begun.set(), over.wait(WATCHDOG))))
    step.start()
    begun.wait()
    page.get_by_label("Message", exact=True).fill("First")
    page.keyboard.press("Enter")
    until(lambda: server.service.taken == 1)
    page.keyboard.press("Escape")
    answer(page)
    over.set()
    step.join()
    page.get_by_label("Message", exact=True).fill("Second")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.keyboard.press("Enter")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "First\n\nSecond"}]
    assert answer(page, 2).locator(".said").inner_text()


def test_what_a_model_writes_is_text(page, server) -> None:
    deltas = [{"reasoning_content": "a <i>thought</i>"}, *({"content": piece} for piece in ANSWER.splitlines(True))]
    chunks = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    stream = "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    ready(page, server.address)
    page.get_by_label("Message", exact=True).fill("Write")
    page.keyboard.press("Enter")
    said = answer(page).locator(".said")
    assert said.locator("img, script, b, i").count() == 0 and "onerror" in said.inner_text()
    assert [link.get_attribute("href") for link in said.locator("a").all()] == ["https://example.org/"]
    assert said.locator("h3 em").inner_text() == "title" and said.locator("strong").inner_text() == "bold"
    assert said.locator("ul > li").count() == 2 and said.locator("ul ol li").inner_text() == "inner"
    assert said.locator("td.end").inner_text() == "2"
    assert said.locator("pre").inner_text() == 'print("<b>hello</b>")'
    thought = page.locator(".thought")
    assert not thought.is_visible()
    page.get_by_text("Reasoning").click()
    assert thought.inner_text() == "a <i>thought</i>"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    said.get_by_role("button", name="Copy this code").click()
    said.get_by_text("Copied").wait_for()


def test_it_asks_for_the_key_and_forgets_it_with_the_tab(browser, page) -> None:
    with running(LLM(), api_key=("right-key",)) as server:
        page.goto(server.address)
        field = page.locator("#ask-key input")
        field.fill("wrong-key")
        page.keyboard.press("Enter")
        page.get_by_text("does not take this key").wait_for()
        field.fill("right-key")
        page.keyboard.press("Enter")
        page.wait_for_selector("[data-state=ready]")
        assert page.context.storage_state()["origins"] == []  # nothing that outlives the tab
        page.get_by_label("Message", exact=True).fill("Hello")
        page.keyboard.press("Enter")
        answer(page)


def test_the_settings_reach_the_request(page, server) -> None:
    ready(page, server.address)
    page.locator("#open-settings").click()
    for label, value in (("System prompt", "Be brief."), ("Temperature", "0"), ("Longest answer", "7"), ("Seed", "3")):
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Done").click()
    page.get_by_label("Message", exact=True).fill("Hello")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.keyboard.press("Enter")
    body = asked.value.post_data_json
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 7, 3) and "top_p" not in body
    assert "ended by its length" in answer(page).locator(".stats").inner_text()


def test_the_machine_is_shown_and_explored_by_keys(page, server) -> None:
    server.post("/v1/completions", prompt="Once", max_tokens=3)
    ready(page, server.address)
    page.get_by_text("busiest: layer").wait_for()
    page.locator("#experts").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.get_by_text("layer 1, expert 1:").wait_for()
    assert "places taken" in page.locator("#queue").inner_text() and "MB" in page.locator("#weights").inner_text()
    assert "NaN" not in page.locator("#machine").inner_text()


def test_a_narrow_screen_has_all_of_it(page, server) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    ready(page, server.address)
    page.locator("#toggle-machine").focus()
    page.keyboard.press("Enter")
    page.get_by_text("places taken").wait_for()
    assert not page.locator("#message").is_hidden() and page.locator("#machine").bounding_box()["width"] == 360
    page.keyboard.press("Enter")
    page.get_by_label("Message", exact=True).fill("x" * 200)
    page.keyboard.press("Enter")
    answer(page)
    for part in page.locator("header, #scroll, #composer, #send, .user .text, #toggle-machine").all():
        box = part.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_the_tab_key_goes_through_everything(page, server) -> None:
    ready(page, server.address)
    page.locator("h1").click()
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        focused = page.locator(":focus-visible")
        reached.append(focused.get_attribute("id") or focused.inner_text())
    for name in ("open-settings", "toggle-machine", "message", "send", "experts"):
        assert name in reached, reached
