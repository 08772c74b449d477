"""write_report() on a run with everything, and on runs that lack a part."""

import re
from html.parser import HTMLParser

import pytest

from sae_persona.errors import FormatError, ModelError, RunError
from sae_persona.report.page import write_report
from sae_persona.runs import Run, write_json, write_text

VOID = {"meta", "br", "hr", "img", "link", "input"}
PERSONA_IN_HTML = "pirate &amp; &lt;i&gt;co"


class Page(HTMLParser):
    """Tags with their attributes and the text; fails on a tag that is closed out of turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def count(self, tag: str, css: str | None = None) -> int:
        return sum(t == tag and (css is None or css in (a.get("class") or "").split()) for t, a in self.tags)


@pytest.fixture
def page(full) -> Page:
    return Page(write_report(full).read_text(encoding="utf-8"))


def test_has_every_part(page):
    heads = ["Summary", "Which latents tell it", "Where latent 3 fires hardest", "What clamping it does"]
    heads += [
        "Before and after",
        "Side effects",
        "On held-out texts",
        "How often latents fire",
        "While training",
        "Manifest",
    ]
    assert [head for head in heads if head not in page.text] == []
    assert page.count("svg") == 3 + 1 + 4  # volcano, by strength, by cost; firing; loss, fvu, l0, dead
    assert page.count("table", "summary") == page.count("table", "ranking") == page.count("table", "effects") == 1
    assert "sae-persona measure" not in page.text, "nothing is missing, so no command is wanted"


def test_says_how_strong_each_arm_is(page):
    assert "How strong each arm is" in page.text and "wrong sign 3" in page.text
    assert "1×43.25 1.50.40.3" in page.text, "cells: strength, activation set and read back; KL, its mean, ratio"


def test_links_lead_somewhere(page):
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    targets = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert targets == {"#summary", "#persona-1", "#sae", "#manifest"}
    assert {target[1:] for target in targets if target} <= ids


def test_numbers_of_the_summary(page):
    for shown in (
        "0.875 [0.845, 0.905]",
        "10 % [5, 15]",
        "60 % [55, 65]",
        "1.20× [1.18, 1.22]",
        "+2 points",
        "≤ 0.005",
    ):
        assert shown in page.text


def test_says_where_the_latent_falls_short(page):
    assert "It falls short of the difference of means at equal cost for pirate & <i>co." in page.text
    assert "falls short of the difference of means at equal cost: 60 % against 70 %, though the intervals" in page.text
    assert any(tag == "td" and attrs.get("class") == "better" for tag, attrs in page.tags)


def test_shades_tokens_by_activation(page):
    shaded = [attrs for tag, attrs in page.tags if tag == "span" and "--a:" in (attrs.get("style") or "")]
    assert [(a["style"], a["title"]) for a in shaded] == [("--a:1.00", "2.5"), ("--a:0.20", "0.5")]
    assert "i need a good food for bees ." in page.text


def test_unknown_numbers_are_dashes(page):
    assert not re.search(r"\b(nan|None|inf)\b", page.text.split("Versions, configuration")[0])
    assert "evasive" not in page.text, "no question could show it"


def test_needs_no_network_and_runs_nothing(full):
    html = write_report(full).read_text(encoding="utf-8")
    links = [a.get(name) or "" for _, a in Page(html).tags for name in ("src", "href", "action", "data", "srcset")]
    assert [link for link in links if link and not link.startswith("#")] == []
    assert "url(" not in html and "@import" not in html and "http" not in html
    assert not re.search(r"<(script|link|iframe|object|embed)", html)


def test_escapes_what_users_wrote(full):
    html = write_report(full).read_text(encoding="utf-8")
    assert "<script" not in html and "<i>co" not in html
    assert "&lt;script&gt;alert(&#39;arr&#39;)&lt;/script&gt;" in html
    assert f'aria-label="Judged rate of {PERSONA_IN_HTML}' in html, "charts escape too"


def test_same_run_same_bytes(full, tmp_path):
    out = tmp_path / "elsewhere" / "again.html"
    assert write_report(full, out) == out
    assert out.read_bytes() == write_report(full).read_bytes() == full.report.read_bytes()


def test_train_stage_alone(trained):
    page = Page(write_report(trained).read_text(encoding="utf-8"))
    assert f"sae-persona measure {trained.path} DIALOGUES" in page.text
    assert "--held-out" in page.text
    assert page.count("svg") == 4
    assert page.count("details", "persona") == 0


def test_ranked_but_not_swept(full):
    for path in (full.path / "sweeps").iterdir():
        path.unlink()
    page = Page(write_report(full).read_text(encoding="utf-8"))
    assert f"sae-persona sweep {full.path} 'pirate & <i>co' DEVELOPMENT TEST" in page.text
    assert "1 of 1 ranked persona has a latent that tells them better than chance" in page.text
    assert "Where latent 3 fires hardest" in page.text


def test_swept_without_a_ranking(full):
    for path in (full.path / "rankings").iterdir():
        path.unlink()
    page = Page(write_report(full).read_text(encoding="utf-8"))
    assert "This persona has not been ranked." in page.text
    assert "60 % [55, 65]" in page.text


def test_refuses_a_run_without_an_sae(tmp_path):
    with pytest.raises(RunError, match="no train stage"):
        write_report(Run.create(tmp_path / "run"))


def test_refuses_another_model(full):
    manifest = full.manifest
    manifest["stages"][0]["model"]["config_hash"] = "0" * 64
    write_json(full.path / "manifest.json", manifest)
    with pytest.raises(ModelError, match="is not the model"):
        write_report(full)
    assert not full.report.exists()


def test_refuses_a_broken_log(trained):
    write_text(trained.metrics, '{"tokens": 1, "los')
    with pytest.raises(FormatError, match="not a log of training steps"):
        write_report(trained)
