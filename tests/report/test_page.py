"""The page shows what the run's files say, loads nothing, and lets no text of a model become markup."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_run import HOSTILE, blames, claims, finding

from unmask.errors import UserError
from unmask.report import run as runs
from unmask.report.page import floors, rail, render, token_data, visible, write_blame, write_report
from unmask.report.run import Blame


class Text(HTMLParser):
    """The words of a page, how often each tag opens and closes, and what it refers to."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words, self.hidden, self.refers = "", "", list[str]()
        self.opened, self.closed = dict[str, int](), dict[str, int]()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.refers += [
            str(value) for name, value in attrs if name in ("src", "href", "action", "data", "xlink:href")
        ]
        self.opened[tag] = self.opened.get(tag, 0) + 1
        self.hidden = tag if tag in ("script", "style") else self.hidden

    def handle_endtag(self, tag: str) -> None:
        self.closed[tag] = self.closed.get(tag, 0) + 1
        self.hidden = "" if tag == self.hidden else self.hidden

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words += data


def words_of(source: str) -> str:
    return " ".join(Text(source).words.split())


def inlined(source: str) -> Any:
    found = re.search(r'<script type="application/json" id="blames">(.*?)</script>', source, re.S)
    assert found is not None
    return json.loads(found[1])


def test_one_file_below_5_mb_that_loads_nothing(page: Path) -> None:
    source = page.read_text("utf-8")
    assert page.stat().st_size < 5e6
    assert all(target.startswith("#") for target in Text(source).refers)
    assert not re.findall(r"@import|url\(\s*[\"']?(?!#)|fetch\(|XMLHttpRequest|WebSocket|https?:", source)
    assert "default-src 'none'" in source


def test_every_tag_that_opens_closes(page: Path) -> None:
    text = Text(page.read_text("utf-8"))
    for tag in (
        "section",
        "figure",
        "div",
        "table",
        "details",
        "button",
        "ol",
        "ul",
        "span",
        "main",
        "svg",
        "p",
        "li",
    ):
        assert text.opened[tag] == text.closed[tag], tag


def test_each_claim_of_the_truth_stands_in_words(page: Path) -> None:
    words = words_of(page.read_text("utf-8"))
    for said in (
        "0.956 (0.931 to 0.977; n = 115 countries)",
        "26.8 nats",
        "80 % (70 to 90; n = 57 countries)",
        "97.0 %",
        "61.5 %",
        "62.6 %",
        "56.2 %",
        "agrees with held-out people on 58.8 % (55.2 to 62.4; n = 700 conversations) of all pairs",
        "2.229 bits/byte",
        "0.810 nats/token",
        "not distinguishable",
        "10.7 min",
        "5.81 M parameters",
        "10 of 80 planted facts",
        "912 GFLOP/s",
    ):
        assert said in words, said


def test_every_finding_has_a_row(page: Path, run_directory: Path) -> None:
    source = page.read_text("utf-8")
    table = source[source.index('id="findings"') :]
    rows = [json.loads(line) for line in (run_directory / "findings.jsonl").read_text().splitlines()]
    assert table.count("<code>") >= len(rows)
    assert all(f"<code>{row['metric']}</code>" in table for row in rows)


def test_every_figure_has_a_caption_and_its_numbers(page: Path) -> None:
    source = page.read_text("utf-8")
    figures = re.findall(r"<figure>.*?</figure>", source, re.S)
    assert len(figures) >= 10
    for figure in figures:
        assert "<figcaption>" in figure
        assert figure.count("<td") >= 1
        assert "<svg" not in figure or 'aria-hidden="true"' in figure


def test_text_of_models_stays_text(page: Path, tmp_path: Path) -> None:
    alone = write_blame(tmp_path / "blame.html", blames()[2])
    for source in (page.read_text("utf-8"), alone.read_text("utf-8")):
        assert "<script>alert" not in source
        assert "<img" not in source
        assert source.count("<script") == source.count("</script>") == 2
        assert html.escape(HOSTILE.split(" \u202e")[0], quote=False) in source
    assert inlined(page.read_text("utf-8"))[2]["tokens"][1]["text"] == "ünï"


def test_bytes_of_the_command_line_that_are_no_text_do_not_stop_the_page(tmp_path: Path) -> None:
    odd = blames()[0] | {"prompt": b"caf\xe9 and more".decode("utf-8", "surrogateescape")}
    assert "caf? and more" in write_blame(tmp_path / "blame.html", odd).read_text("utf-8")


def test_tokens_carry_their_layer_without_colour(page: Path) -> None:
    source = page.read_text("utf-8")
    assert re.search(r'class="t l1 gap" aria-label=" capital: sft">capital</button>', source)
    assert re.search(r'class="t l-1" aria-label="↵: no layer">↵</button>', source)
    assert ".l0 { --c: var(--layer-0); --u: solid; }" in source
    assert ".l1 { --c: var(--layer-1); --u: double; }" in source


def test_the_script_gets_every_credit(page: Path) -> None:
    for told, blame in zip(inlined(page.read_text("utf-8")), blames(), strict=True):
        assert told["layers"] == blame["layers"]
        for token, given in zip(told["tokens"], blame["tokens"], strict=True):
            assert token["credits"] == pytest.approx(given["credits"], abs=1e-5)
            assert token["logprob"] == pytest.approx(given["logprob"], abs=1e-5)


def test_details_begin_at_the_word_where_a_layer_above_the_base_stands_out() -> None:
    hello = Blame.model_validate(blames()[1])
    assert hello.tokens[token_data(hello, hello.layers)["start"]].text == " happy"
    empty = hello.model_copy(update={"tokens": []})
    assert token_data(empty, empty.layers)["start"] == 0


def test_the_rail_puts_children_right_of_their_parents(run_directory: Path) -> None:
    drawn = rail(runs.read(run_directory))
    places = {node.stage.name: (node.row, node.column, node.parent) for node in drawn.nodes}
    assert drawn.columns == 3
    assert places == {
        "base": (1, 1, None),
        "sft": (1, 2, "base"),
        "rl": (1, 3, "sft"),
        "reward": (2, 3, "sft"),
        "gold": (3, 3, "sft"),
    }
    assert next(node for node in drawn.nodes if node.stage.name == "rl").inputs == [("reward", "reward")]


def test_claims_come_before_other_findings(run_directory: Path) -> None:
    rows = [finding("blame_auc", "sft_only_vs_both", "sft", 0.111, (0.1, 0.2), 5, "1")]
    (run_directory / "findings.jsonl").write_text(json.dumps(rows[0].to_json()) + "\n")
    run = runs.read(run_directory)
    found = run.get("blame_auc", "sft_only_vs_both", "sft")
    assert found is not None
    assert found.value == 0.956
    extra = finding("unheard_of", None, "sft", 0.5, (0.4, 0.6), 5, "1")
    (run_directory / "findings.jsonl").write_text(json.dumps(extra.to_json()) + "\n")
    assert runs.read(run_directory).get("unheard_of") == extra


def test_a_run_without_facts_ratings_or_metrics_has_a_page_without_them(run_directory: Path) -> None:
    summary = json.loads((run_directory / "summary.json").read_text())
    summary["claims"] = [claim.to_json() for claim in claims() if claim.metric == "bits_per_byte"]
    summary["stages"] = summary["stages"][:1]
    del summary["gold"]
    (run_directory / "summary.json").write_text(json.dumps(summary))
    for name in ("findings.jsonl", "blame.json", "facts.jsonl"):
        (run_directory / name).unlink()
    shutil.rmtree(run_directory / "work")
    source = render(runs.read(run_directory))
    assert 'id="truth"' not in source
    assert 'id="rl"' not in source
    assert 'id="findings"' in source
    assert inlined(source) == []


def test_a_base_that_adds_nothing_to_plain_text_is_shown_in_the_chat(run_directory: Path) -> None:
    told = json.loads((run_directory / "blame.json").read_text("utf-8"))
    told[0] |= {"plain": " \n"}
    told[0]["alone"]["base"] = "Hello, who is there?"
    (run_directory / "blame.json").write_text(json.dumps(told), "utf-8")
    source = render(runs.read(run_directory))
    assert "in a chat, such as it never saw, it says:" in source
    assert "“<bdi>Hello, who is there?</bdi>”" in source


def test_its_commands_name_the_run_from_where_it_was_written_and_no_folder_of_the_writer(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_directory.parent)
    assert f"unmask log {run_directory.name}<" in render(runs.read(run_directory))
    elsewhere = run_directory.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    source = render(runs.read(run_directory))
    assert f"unmask log {run_directory.name}<" in source
    assert str(run_directory.parent) not in source


def test_an_abstaining_finding_is_shown_as_one(run_directory: Path) -> None:
    row = claims()[0].to_json() | {
        "metric": "gold_gain", "value": None, "ci95": None, "n": 1, "verdict": "abstain: n = 1", "probe": "G-9",
        "group": None, "child": "rl",
    }  # fmt: skip
    with (run_directory / "findings.jsonl").open("a") as file:
        file.write(json.dumps(row | {"text_source": "elsewhere"}) + "\n")
    assert "abstain: n = 1" in words_of(render(runs.read(run_directory)))


def test_floors_are_named_and_in_the_unit_of_the_value() -> None:
    found = finding("blame_auc", "x", "sft", 0.9, (0.8, 1.0), 9, "1", floor_seed=0.25, null_specific=0.5)
    assert floors(found) == "bf16 0.002; seeds 0.25; chance 0.5"
    assert floors(finding("facts_kept", "x", "rl", 0.9, (0.8, 1.0), 9, "1")) == "bf16 0.2 %"


def test_characters_without_a_look_get_a_sign() -> None:
    assert visible("a\n\t\u202e\x00\ufeffé 🙂") == "a↵⇥\\u202e\\u0000\\ufeffé 🙂"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", None, r"no summary\.json"),
        ("summary.json", "{", r"summary\.json"),
        (
            "summary.json",
            '{"total_seconds": 1, "stages": [{}], "claims": []}',
            r"summary\.json: prepare_seconds",
        ),
        ("findings.jsonl", '{"metric": "x"}\n', r"findings\.jsonl:1: "),
        ("findings.jsonl", "nonsense\n", r"findings\.jsonl:1: not valid JSON"),
        ("blame.json", '[{"prompt": 1}]', r"blame\.json: 0\."),
        ("work/base/metrics.jsonl", "{}\n[1]\n", r"metrics\.jsonl:2"),
    ],
)
def test_a_damaged_run_is_an_error_that_names_the_file(
    run_directory: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (run_directory / name).unlink()
    else:
        (run_directory / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_report(run_directory)
    assert not (run_directory / "report.html").exists()


PROBE = """<body><iframe src="NAME" style="width:360px;height:800px;border:0"></iframe><pre id="out"></pre><script>
document.querySelector("iframe").onload = function () {
  const page = this.contentDocument, view = this.contentWindow, box = page.querySelector(".blame");
  const tokens = [...box.querySelectorAll(".t")], pressed = () => tokens.findIndex((t) => t.ariaPressed === "true");
  const said = { width: page.documentElement.scrollWidth, start: pressed(), bars: box.querySelectorAll(".bar").length };
  tokens[2].focus(); said.focused = pressed();
  tokens[2].dispatchEvent(new view.KeyboardEvent("keydown", { key: "ArrowRight" })); said.right = pressed();
  page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", { key: "ArrowLeft" })); said.left = pressed();
  page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", { key: "End" })); said.end = pressed();
  said.last = tokens.length - 1; said.first = box.querySelector(".bar b").textContent;
  document.getElementById("out").textContent = JSON.stringify(said);
};</script>"""


@pytest.mark.skipif(not (CHROMIUM := shutil.which("chromium")), reason="needs chromium")
def test_in_a_browser_nothing_overflows_a_phone_and_keys_step_through_tokens(
    page: Path, tmp_path: Path
) -> None:
    (tmp_path / "probe.html").write_text(PROBE.replace("NAME", page.as_uri()))
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
            (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    found = re.search(r'<pre id="out">(\{.*?\})</pre>', done.stdout)
    assert found is not None, done.stderr[-500:]
    said = json.loads(found[1])
    assert said["width"] <= 360
    assert said["bars"] == 3
    assert (said["start"], said["focused"], said["right"], said["left"], said["end"]) == (
        1,
        2,
        3,
        2,
        said["last"],
    )
    assert said["first"] == "−6.100"
