"""The playground works with every architecture, shows the model's own probabilities in a real browser, and its server answers its page only."""

import http.client
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from browser import new_context, open_browser, watch
from helpers import ROOT, STARTED, TINY, lmnotes_command, start_process, wait_for_exit, wait_until

import lmnotes
from lmnotes.apps.cli import execute_command
from lmnotes.apps.playground import MAX_NEW, AttentionRequest, Playground, TextRequest, attention_rows, continue_text
from lmnotes.apps.playground_server import FILES, HEADERS
from lmnotes.apps.playground_view import SCRIPT, STYLE, answer_message, show_playground
from lmnotes.data.tokenizer import ByteTokenizer, CharTokenizer
from lmnotes.inspect.attention import attention_maps
from lmnotes.inspect.tokens import has_probabilities, token_text
from lmnotes.nn.lm import new_lm
from lmnotes.runs.load import Run

SIZES = dict(d_model=16, n_layers=2, n_heads=2)
EXPERT = "d_model=16,n_layers=1"
CASES = {  # {name: (architecture, configuration, parts that it has)}
    "bigram": ("bigram", {}, ""),
    "rnn": ("rnn", dict(d_model=16, d_hidden=16), ""),
    "lstm": ("rnn", dict(d_model=16, d_hidden=16, cell="lstm"), ""),
    "gpt": ("gpt", SIZES, "attention"),
    "scratch_gpt": ("scratch_gpt", SIZES, "attention"),
    "gpt2": ("gpt2", SIZES, "attention"),
    "ssm": ("ssm", dict(d_model=16, n_layers=2, head_dim=8, d_state=4), ""),
    "s6": ("ssm", dict(preset="nanothink_s6", d_model=16, d_inner=32, n_layers=1, d_state=4), ""),
    "bytepatch": ("bytepatch", SIZES | dict(d_byte=16, ngram_rows=64), "attention thinking"),
    "agiformer": ("bytepatch", SIZES | dict(preset="agiformer", d_byte=16), "attention thinking"),
    "streams": ("streams", SIZES, "attention"),
    "masked diffusion": ("diffusion", SIZES, "attention"),
    "blocks": ("diffusion", SIZES | dict(block=4), "attention"),
    "next tokens": ("diffusion", SIZES | dict(block=1), "attention"),
    "embeddings": ("diffusion", SIZES | dict(objective="mse", training_steps=5, inference_steps=2), ""),
    "nanothink": (
        "nanothink",
        dict(d_model=16, n_heads=2, head_dim=8, kv_latent_dim=8, rope_dim=4, transformer=f"gpt,{EXPERT},n_heads=2")
        | dict(state_space=f"ssm,{EXPERT},head_dim=8", diffuser=f"diffusion,block=1,{EXPERT},n_heads=2"),
        "attention",
    ),
}


def make_run(name, tokenizer=None, ctx_len=16):
    "Return a run of an untrained model whose probabilities differ from token to token"
    arch, config, _ = CASES[name]
    torch.manual_seed(0)
    lm = new_lm(arch, **dict(vocab_size=256, ctx_len=ctx_len) | config).eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return Run(Path(name), lm, tokenizer or ByteTokenizer(), dict(config={}, data=dict(start=""), step=0))


def ids_of(answer):
    return [token["id"] for token in answer["tokens"]]


def test_every_architecture_is_tested():
    assert {arch for arch, *_ in CASES.values()} == {*lmnotes.archs()}


@pytest.mark.parametrize("name", CASES)
def test_text_alternatives_and_attention_of_every_architecture(name):
    r, parts = make_run(name), CASES[name][2].split()
    about = Playground(r).answer(dict(ask="runs"))["runs"][0]
    assert about["attention"] == ("attention" in parts) and (about["thinking"] is not None) == ("thinking" in parts)
    notes = " ".join(about["notes"])
    assert ("thinking" in parts) != ("has no thinking steps" in notes)
    assert bool(parts and "attention" in parts) != ("attention" in notes)
    answer = continue_text(r, TextRequest("The sea", n=13, seed=3))  # Longer than the context window
    assert answer == continue_text(r, TextRequest("The sea", n=13, seed=3))
    ids, tokens = ids_of(answer), answer["tokens"]
    assert r.tokenizer.decode_bytes(ids[7:]).decode(errors="replace") == r.generate("The sea", 13, seed=3)
    assert answer["n_prompt"] == answer["n_given"] == 7 and len(ids) == 20 and "p" not in tokens[0]
    assert all(("p" in token) == has_probabilities(r.lm) for token in tokens[1:])
    for token in tokens[1:] if has_probabilities(r.lm) else ():
        others = [other["p"] for other in token["alternatives"]]
        assert len(others) == 5 and others == sorted(others, reverse=True) and sum(others) + token["p"] <= 1 + 1e-6
        assert token["id"] not in [other["id"] for other in token["alternatives"]]
        assert token["p"] >= others[-1] or token["rank"] > 5
    if about["attention"]:
        check_attention(r, ids)


def check_attention(r, ids):
    "Every map of a text has a weight for each token, which belongs to a token that the model could read"
    maps = attention_rows(r, AttentionRequest(ids))["maps"]
    for number, (head, shown) in enumerate((i, m) for m in maps for i in (-1, m["heads"] - 1)):
        found = attention_rows(r, AttentionRequest(ids, map=number // 2, head=head))
        assert found["maps"][found["map"]] == shown and found["first"] == len(ids) - len(found["rows"]) == 4
        most = 1010 * (4 if "patches" in shown["name"] else 1)  # The four bytes of a patch have its weight
        for i, row in enumerate(found["rows"]):
            assert len(row) == (i if r.lm.causal else 16) and 0 <= sum(row) <= most
        assert max(map(sum, found["rows"])) > 300


@pytest.mark.parametrize("name, query", {"gpt": 8, "masked diffusion": 9, "bytepatch": 8, "next tokens": 8}.items())
def test_attention_is_that_of_the_position_that_predicts_a_token(name, query):
    r, ids = make_run(name), list(range(60, 76))
    maps = attention_maps(r.lm, torch.tensor(ids))
    for number, m in enumerate(maps):
        row = attention_rows(r, AttentionRequest(ids, map=number, head=1))["rows"][9]
        if len(m[1]) == 4:  # Of patches: the bytes 8 to 11 come after the patch with the bytes 4 to 7
            expected = m[1, 1].repeat_interleave(4)
        else:
            expected = m[1, query]
        assert row == (1000 * expected[: len(row)]).round().int().tolist()


@pytest.mark.parametrize("name", [name for name in CASES if name != "embeddings"])
def test_a_click_keeps_what_is_before_the_token_and_samples_another(name):
    r = make_run(name)
    before = ids_of(continue_text(r, TextRequest("The sea", n=6)))
    for temperature in (0.0, 0.8):
        request = TextRequest("The sea", n=6, temperature=temperature, seed=1, prefix=before[:9], other_than=before[9])
        after = continue_text(r, request)
        assert ids_of(after)[:9] == before[:9] and ids_of(after)[9] != before[9]
        assert (len(after["tokens"]), after["n_given"]) == (13, 10) and after == continue_text(r, request)
    chosen = before[9] + 1 if before[9] < 255 else 0
    assert ids_of(continue_text(r, TextRequest("The sea", n=6, prefix=[*before[:9], chosen])))[9] == chosen


def test_a_click_in_a_model_without_probabilities_generates_again():
    r = make_run("embeddings")
    before = ids_of(continue_text(r, TextRequest("The sea", n=6)))
    after = continue_text(r, TextRequest("The sea", n=6, seed=1, prefix=before[:9], other_than=before[9]))
    assert ids_of(after)[:9] == before[:9] and len(after["tokens"]) == 13


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("masked diffusion", "blocks", "embeddings")])
def test_probabilities_are_those_of_the_model(name):
    r = make_run(name, ctx_len=32)
    tokens = continue_text(r, TextRequest("The sea", n=9))["tokens"]
    with torch.no_grad():
        p = r.lm(torch.tensor([[token["id"] for token in tokens]]))[0].float().softmax(-1)
    for before, token in zip(p, tokens[1:]):
        for item in [token, *token["alternatives"]]:
            assert abs(item["p"] - before[item["id"]].item()) < 1e-4


def test_masks_give_probabilities_from_both_sides():
    r = make_run("masked diffusion", ctx_len=32)
    ids = ids_of(continue_text(r, TextRequest("The sea", n=5)))
    x = torch.tensor([ids])
    x[0, 4] = r.lm.mask_id
    with torch.no_grad():
        p = r.lm(x)[0, 4].softmax(-1)
    token = continue_text(r, TextRequest("The sea", n=5))["tokens"][4]
    assert abs(token["p"] - p[ids[4]].item()) < 1e-5
    ids[-1] = (ids[-1] + 1) % 256  # The last token changes the probability of an earlier one
    other = continue_text(r, TextRequest("The sea", n=5, prefix=ids))["tokens"][4]
    assert abs(token["p"] - other["p"]) > 1e-7


def test_thinking_steps_change_the_probabilities_and_the_attention_maps():
    r = make_run("bytepatch")
    a, b = (continue_text(r, TextRequest("The sea", n=4, thinking_steps=steps)) for steps in (0, 5))
    assert r.lm.cfg.thinking_steps == 3
    assert [t["p"] for t in a["tokens"][5:7]] != [t["p"] for t in b["tokens"][5:7]]  # Of the same prompt
    counts = [len(attention_rows(r, AttentionRequest(ids_of(a), thinking_steps=s))["maps"]) for s in (0, 5)]
    assert counts[1] - counts[0] == 5


def test_sampled_probabilities_follow_the_sliders():
    r = make_run("gpt")
    for settings in (dict(top_k=2), dict(temperature=0), dict(top_p=0.01)):
        tokens = continue_text(r, TextRequest("The sea", n=5, **settings))["tokens"][7:]
        assert all(0 < token["q"] <= 1 for token in tokens)
        for token in tokens:
            left = [item for item in [token, *token["alternatives"]] if item["q"] > 0]
            assert len(left) == settings.get("top_k", 1) and abs(sum(item["q"] for item in left) - 1) < 1e-5


def test_damaged_weights_and_unknown_characters_are_sentences():
    r = make_run("gpt", CharTokenizer.train("The sea"))
    assert "no id for" in continue_text(r, TextRequest("Thé", n=2))["warnings"][0]
    with torch.no_grad():
        r.lm.head.weight.fill_(torch.nan)
    reply = answer_message(Playground(r), dict(id=1, request=dict(ask="text", values=dict(prompt="The", n=0))))
    assert "NaN" in reply["error"]


# In a browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    "Return a folder with the runs `r`, a gpt, and `patches`, a bytepatch"
    work = tmp_path_factory.mktemp("play")
    small = TINY | dict(data=str(corpus), out_dir=str(work / "runs"), steps=60, accum=1, lr=0.03, view=False)
    small |= dict(eval_every=0, sample_every=0, save_every=0)
    lmnotes.run(**small)
    patches = "d_model=16 d_byte=16 n_layers=1 n_heads=2 ngram_rows=64"
    lmnotes.run(**small | dict(run="patches", steps=5, arch="bytepatch", model_args=patches))
    return work


@pytest.fixture(scope="module")
def address(folder):
    "Serve both runs, and yield the address. At the end, Ctrl+C ends the server without a traceback"
    words = "play --run runs/r --run runs/patches --port 0 --prompt wave --n 12 --device cpu".split()
    server = start_process(folder, lmnotes_command, *words, output="served")
    STARTED.remove(server)  # It serves all tests of this file
    log = folder / "served"
    wait_until(lambda: log.exists() and "http://" in log.read_text(), server)
    yield re.search(r"http://127\.0\.0\.1:\d+", log.read_text())[0]
    os.kill(server.pid, signal.SIGINT)
    assert wait_for_exit(server) == 0, log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser():
    with open_browser(viewport=dict(width=1200, height=900)) as context:
        yield context


@pytest.fixture
def page(browser, address):
    "Open the page, and check that it asked no other server"
    page = browser.new_page()
    errors, outside = watch(page, address)
    page.goto(address)
    until_idle(page)
    yield page
    page.close()
    assert not outside and not [error for error in errors if "422" not in error]


def until_idle(page):
    "Wait until every column shows a text"
    page.locator(".foot span", has_text="new tokens").last.wait_for()
    for column in page.locator(".column").all():
        column.locator("xpath=self::*[not(@aria-busy)]").wait_for()


def texts(page, selector):
    return [element.inner_text() for element in page.locator(selector).all()]


def shown_alternatives(page):
    "Return {token: (probability of the model, probability after the sliders)} of the box"
    page.locator(".tip").wait_for()
    lines = [line.inner_text().split("\n") for line in page.locator(".tip button").all()]
    return {text: tuple(float(p.strip("<% ")) / 100 for p in numbers) for text, *numbers in lines}


def test_two_runs_show_the_text_of_the_same_prompt(page, folder):
    for name, shown in zip(("r", "patches"), page.locator(".tokens").all()):
        tokens = continue_text(lmnotes.load(folder / "runs" / name), TextRequest("wave", n=12))["tokens"]
        assert shown.text_content().replace("↵", "") == "".join(token["readable"] for token in tokens)
    assert [re.sub(r" ·.*", "", text) for text in texts(page, ".head")] == ["r\ngpt", "patches\nbytepatch"]
    assert texts(page, ".notes") == ["gpt has no thinking steps.", "Trained with 3 thinking steps."]


def test_hovering_shows_five_alternatives_with_the_probabilities_of_the_model(page, folder):
    r = lmnotes.load(folder / "runs/r")
    tokens = continue_text(r, TextRequest("wave", n=12, temperature=0.2))["tokens"]
    page.get_by_role("slider", name="temperature").fill("0.2")
    page.locator(".tokens").first.filter(has_text="".join(token["readable"] for token in tokens)).wait_for()
    until_idle(page)
    page.locator(".token").nth(12).hover()
    shown = shown_alternatives(page)
    current = page.locator(".tip button[aria-current]").inner_text().split("\n")[0]
    assert current == token_text(r.tokenizer, tokens[12]["id"]) and len(shown) == 6
    with torch.no_grad():
        logits = r.lm(torch.tensor([[token["id"] for token in tokens[:12]]]))[0, -1]
    p, q = ({token_text(r.tokenizer, i): v for i, v in enumerate((logits / t).softmax(-1).tolist())} for t in (1, 0.2))
    assert all(abs(p[text] - a) < 0.006 and abs(q[text] - b) < 0.006 for text, (a, b) in shown.items())
    assert max(abs(p[text] - q[text]) for text in shown) > 0.02
    others = sorted((p[text] for text in shown if text != current), reverse=True)
    assert others == sorted((value for text, value in p.items() if text != current), reverse=True)[:5]


def test_a_click_samples_another_token_and_a_choice_takes_one(page):
    first = page.locator(".column").first
    token = first.locator(".token").nth(10)
    before = first.locator(".token").all_text_contents()
    token.click()
    first.locator(".token.chosen").wait_for()
    until_idle(page)
    after = first.locator(".token").all_text_contents()
    assert after[:10] == before[:10] and after[10] != before[10]
    page.mouse.move(5, 5)
    token.hover()
    choice = page.locator(".tip button:not([aria-current])").nth(3)
    wanted = choice.locator("code").inner_text()
    choice.click()
    first.locator("span", has_text="seed 2").wait_for()
    assert first.locator(".token.chosen").get_attribute("aria-label").startswith(f"{wanted}, probability")
    assert first.locator(".token").all_text_contents()[:10] == before[:10]
    first.get_by_role("button", name="Undo my choices").click()
    first.locator(".token.chosen").wait_for(state="detached")
    until_idle(page)
    assert first.locator(".token").all_text_contents() == before


def test_keys_move_choose_and_sample(page):
    column = page.locator(".column").nth(1)
    column.locator(".token[tabindex='0']").focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    assert len(shown_alternatives(page)) == 6
    assert re.match(r"1: .+ %\. 2: ", column.locator(".token:focus").get_attribute("aria-description"))
    wanted = page.locator(".tip button:not([aria-current]) code").nth(1).inner_text()
    page.keyboard.press("2")
    column.locator(".token.chosen").wait_for()
    until_idle(page)
    assert column.locator(".token.chosen").get_attribute("aria-label").startswith(f"{wanted}, probability")
    page.keyboard.press("Enter")
    column.locator("span", has_text="seed 2").wait_for()
    until_idle(page)
    assert not column.locator(".token.chosen").get_attribute("aria-label").startswith(f"{wanted}, probability")
    assert "token" in page.evaluate("document.activeElement.className")
    page.keyboard.press("Escape")
    assert not page.locator(".tip").is_visible()


def test_hovering_shades_the_tokens_that_the_chosen_head_attends_to(page, folder):
    column, r = page.locator(".column").first, lmnotes.load(folder / "runs/r")
    ids = ids_of(continue_text(r, TextRequest("wave", n=12)))
    for option, head in (("head 2 of 2", 1), ("mean of 2 heads", -1)):
        with page.expect_response("**/ask"):
            column.get_by_label("head").select_option(option)
        page.mouse.move(5, 5)
        column.locator(".token").nth(12).hover()
        column.locator(".attending").wait_for()
        row = attention_rows(r, AttentionRequest(ids, head=head))["rows"][12]
        shown = [float(t.evaluate("e => e.style.getPropertyValue('--weight')")) for t in column.locator(".token").all()]
        assert shown == pytest.approx([(weight / max(row)) ** 0.5 for weight in row + [0] * 4])
    column.get_by_label("head").select_option("off")
    page.mouse.move(5, 5)
    column.locator(".token").nth(12).hover()
    page.locator(".tip").wait_for()
    assert not column.locator(".attending").count()


def test_sliders_change_the_text_of_both_runs(page):
    before = texts(page, ".tokens")
    page.get_by_role("slider", name="temperature").fill("0")
    page.locator("output", has_text="greedy").wait_for()
    page.wait_for_timeout(300)
    until_idle(page)
    assert all(a != b for a, b in zip(before, texts(page, ".tokens")))
    page.locator(".token").nth(12).hover()
    assert "100 %" in page.locator(".tip button[aria-current]").inner_text()
    page.get_by_role("slider", name="thinking steps").fill("0")
    page.get_by_label("prompt").fill("<b>moss</b>")
    page.get_by_label("prompt").press("Control+Enter")
    page.locator(".tokens", has_text="<b>moss</b>").nth(1).wait_for()
    assert not page.locator("b", has_text="moss").count()


def test_a_wrong_value_is_a_sentence_on_the_page(page):
    page.get_by_label("prompt").evaluate("e => { e.removeAttribute('maxlength'); e.value = 'a'.repeat(5000) }")
    page.get_by_role("button", name="Generate").click()
    page.locator(".wrong", has_text="5,000 characters. Use at most 4,000").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_a_phone_in_both_schemes(browser, address, scheme):
    context = new_context(
        browser.browser, viewport=dict(width=390, height=800), color_scheme=scheme, has_touch=True, is_mobile=True
    )
    page = context.new_page()
    page.goto(address)
    until_idle(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    lightness = page.locator(".card").first.evaluate("e => getComputedStyle(e).backgroundColor.match(/[\\d.]+/)[0]")
    assert (float(lightness) < 0.5) == (scheme == "dark")
    token = page.locator(".token").nth(9)
    token.tap()
    box = page.locator(".tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    for selector in (".token >> nth=3", ".tip button >> nth=0", ".notes >> nth=0", "label >> nth=0", ".main"):
        assert page.locator(selector).evaluate(CONTRAST) >= 4.5, selector
    before = token.text_content()
    token.tap()  # The second tap samples
    page.locator(".token.chosen").wait_for()
    until_idle(page)
    assert page.locator(".token").nth(9).text_content() != before
    context.close()


# Contrast of text and background, as defined by WCAG
CONTRAST = """(element) => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
  const paint = canvas.getContext("2d", {willReadFrequently: true})
  const luminance = () => {
    const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const fill = color => { paint.fillStyle = color; paint.fillRect(0, 0, 1, 1) }
  const behind = []
  for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor)
  behind.forEach(fill)
  const back = luminance()
  fill(getComputedStyle(element).color)
  const [low, high] = [back, luminance()].sort((a, b) => a - b)
  return (high + 0.05) / (low + 0.05)
}"""


def test_the_widget_draws_the_same_view_from_messages(browser, folder):
    "A page imports the widget's script as JupyterLab does, and its messages reach the kernel's function"
    r = lmnotes.load(folder / "runs/r")
    r.folder = Path("<img src=x onerror=alert(1)>")
    playground, page = Playground(r, prompt="wave", n=9), browser.new_page()
    errors, outside = watch(page, "http://widget.test/")
    files = {"/": "<div id=w></div>", "/w.js": SCRIPT, "/w.css": STYLE}
    kinds = {"/": "text/html", "/w.js": "text/javascript", "/w.css": "text/css"}

    def serve(route):
        path = "/" + route.request.url.split("/", 3)[3]
        route.fulfill(body=files[path], content_type=kinds[path])

    page.route("http://widget.test/**", serve)
    page.expose_function("kernel", lambda message: answer_message(playground, message))
    page.goto("http://widget.test/")
    page.evaluate("""async () => {
      const {default: widget} = await import("/w.js")
      let listener
      const model = {on: (name, f) => (listener = f), send: async message => listener(await window.kernel(message))}
      widget.render({model, el: document.getElementById("w")})
    }""")
    until_idle(page)
    tokens = continue_text(r, TextRequest("wave", n=9))["tokens"]
    assert page.locator(".tokens").text_content().replace("↵", "") == "".join(token["readable"] for token in tokens)
    assert page.locator("h2").inner_text() == r.folder.name and not page.locator("img").count()
    page.locator(".token").nth(6).click()
    page.locator(".token.chosen").wait_for()
    page.close()
    assert not errors and not outside


def test_the_widget_is_a_line_of_text_elsewhere():
    widget = show_playground(make_run("gpt"), make_run("rnn"))
    assert widget._esm == SCRIPT and repr(widget) == "Playground of gpt and rnn. Run this cell in JupyterLab"


# The server


def send(address, method="POST", path="/ask", body=b'{"ask": "runs"}', **headers):
    "Return (status, headers, text) of a request"
    host = address.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body if method == "POST" else None, given)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers, text


def test_the_server_answers_its_own_page(address):
    assert send(address)[0] == send(address, Origin=address, Sec_Fetch_Site="same-origin")[0] == 200
    for path in FILES:
        status, headers, text = send(address, "GET", path)
        assert status == 200 and text == FILES[path][0] and all(headers[n] == value for n, value in HEADERS.items())
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy


@pytest.mark.parametrize(
    "status, given",
    {
        "another name for this address": (400, dict(Host="example.com")),
        "another site": (403, dict(Origin="http://example.com")),
        "a page of another port": (403, dict(Origin="http://127.0.0.1:1")),
        "a page without an origin": (403, dict(Origin="null")),
        "a link from another site": (403, dict(Sec_Fetch_Site="cross-site")),
        "a form": (415, dict(Content_Type="text/plain")),
        "another file": (404, dict(method="GET", path="/../run.json")),
        "a question by address": (405, dict(method="GET")),
        "a long body": (422, dict(body=b" " * 70_000)),
        "no JSON": (422, dict(body=b"{")),
        "deep JSON": (422, dict(body=b"[" * 60_000)),
        "no object": (422, dict(body=b"3")),
        "an unknown run": (422, dict(body=b'{"ask": "text", "run": 2}')),
        "a huge text": (422, dict(body=json.dumps(dict(ask="text", values=dict(n=MAX_NEW + 1))).encode())),
        "an infinite temperature": (422, dict(body=b'{"ask": "text", "values": {"temperature": 1e999}}')),
        "an unknown id": (422, dict(body=b'{"ask": "text", "values": {"prefix": [99999]}}')),
        "no id": (422, dict(body=b'{"ask": "attention", "values": {"ids": [-1]}}')),
        "half a character": (422, dict(body=b'{"ask": "text", "values": {"prompt": "\\ud800"}}')),
    }.values(),
)
def test_wrong_requests_get_a_sentence(address, status, given):
    found, _, text = send(address, **given)
    assert found == status and len(text) < 300
    if status not in (400, 404, 405):
        assert json.loads(text)["error"]


def test_a_missing_package_is_a_sentence(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name in ("starlette.applications", "anywidget"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert execute_command(["play", "--run", "runs/r", "--device", "cpu"]) == 2
    assert "pip install 'lmnotes[play]'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"pip install 'lmnotes\[lab\]'"):
        show_playground(SimpleNamespace())


def test_the_packages_are_in_the_extras():
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert "play_requirements = starlette uvicorn\n" in settings
    assert re.search(r"^lab_requirements = .*\banywidget\b", settings, re.M)
