"""The page of a study: what it has, and how it behaves in a browser without a screen."""

import dataclasses
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from made_up import STUDY, MadeUp, correct, load
from robsparse.figures import PAGE, PLOTS, TABLES, report
from robsparse.figures.data import summary, tidy
from robsparse.figures.page import page, sections, vectors
from robsparse.figures.plots import finals, style
from robsparse.study import loading
from robsparse.study.cells import Layout

REASON = "random search breaks 4% of the images that withstand 200 steps of PGD"


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Layout:
    """A small study with its page, and with results of which LWM at 95 % and seed 1 are missing."""
    folder = tmp_path_factory.mktemp("page")
    study = load(folder)
    lost = lambda c: (c.method, c.sparsity, c.seed) == ("lwm", 0.95, 1)  # noqa: E731
    made_up = MadeUp(study, Layout(folder / "made_up"), correct, skip=lost)
    made_up.potentially_unreliable = REASON
    layout = made_up.write()
    report.write(study, layout, layout.root)
    return layout


@pytest.fixture(scope="module")
def html(layout) -> str:
    return (layout.root / PAGE).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """All tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


# ------------------------------------------------------------------ content


def test_page_refers_to_nothing_elsewhere(layout, html):
    tags = Tags(html).found
    assert not [tag for tag, _ in tags if tag in ("iframe", "object", "embed")]
    links = [a[name] for _, a in tags for name in ("src", "href", "xlink:href") if a.get(name)]
    own = {f"#{attributes['id']}" for _, attributes in tags if "id" in attributes}
    files = {*PLOTS, *TABLES}
    for link in links:
        assert link in own or link in files or link.startswith("data:"), link
    assert {link for link in links if link in files} >= {"tables/main.csv", "plots/pareto.png"}


def test_identifiers_are_unique(html):
    ids = Counter(attributes["id"] for _, attributes in Tags(html).found if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []


def test_every_plot_is_on_the_page_for_a_screen_and_for_a_phone(html):
    shown = {a["id"] for tag, a in Tags(html).found if tag == "figure"}
    names = {Path(name).stem for name in PLOTS if name.endswith(".png")}
    assert shown == {f"plot-{name}" for name in names}
    kinds = Counter(a.get("class") for tag, a in Tags(html).found if tag == "div")
    assert kinds["plot wide"] == kinds["plot narrow"] == len(names)


def test_every_network_has_its_section(layout, html):
    study = load(layout.root.parent)
    opened = {a["id"] for tag, a in Tags(html).found if a.get("class") == "network"}
    assert opened == {cell.key.replace("/", "-") for cell in study.cells()}
    assert html.count("checksum of weights") == len(study.cells()) - 1  # one has no result


def test_a_large_study_has_sections_for_the_first_seed_and_says_so(layout, monkeypatch):
    material = summary.make_material(load(layout.root.parent), layout, tidy.read(layout.root))
    every = page.page(material, {})
    monkeypatch.setattr(sections, "MOST_NETWORKS", 9)
    html, networks = page.page(material, {}), len(material.study.cells())
    opened = {a["id"] for tag, a in Tags(html).found if a.get("class") == "network"}
    first = [cell for cell in material.study.cells() if cell.seed == 0]
    assert opened == {cell.key.replace("/", "-") for cell in first}
    assert f"The study has {networks} networks. This page describes the {len(first)} of" in html
    assert "One entry for each trained network" not in html
    for text in (f"{networks - 1} of {networks} networks have", f"1 of {networks} networks failed"):
        assert text in html  # of all networks
        assert text in every


def test_missing_and_failed_networks_are_listed(tmp_path):
    study = load(tmp_path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    read = tidy.read(layout.root)
    first = next(cell for cell in study.cells() if cell.method == "bcs")
    gone = read.results.apply(lambda r: (r.method, r.sparsity, r.seed) == ("bcs", 0.9, 0), axis=1)
    failures = pd.DataFrame([vars(first) | {"reason": "only <guesses>"}])
    changed = SimpleNamespace(
        study=study, tidy=SimpleNamespace(results=read.results[~gone], failures=failures)
    )
    assert sections.failures(changed) == [
        {"method": "bcs", "network": "BCS 90 %, seed 0", "reason": "only <guesses>"}
    ]
    changed.tidy.failures = failures.iloc[:0]
    assert sections.failures(changed)[0]["reason"] == "no result yet"


def test_a_network_without_a_result_has_no_grade(layout, html):
    cell = next(c for c in load(layout.root.parent).cells() if c.key.endswith("s0.9500/seed1"))
    own = html[html.index(f'id="{cell.key.replace("/", "-")}"') :].split("</details>")[0]
    assert '<span class="grade no-result-yet">no result yet</span>' in own
    assert not re.search("AutoAttack|Provenance|grade (fine|look)", own)
    top = html[html.index('<section id="summary">') : html.index('<section id="results">')]
    assert "<li>1 of 10 networks failed or have no\nresult yet" in top
    assert "<li>9 of 10 networks have the grade look or\nunreliable" in top


def test_a_failed_network_has_its_reason_in_place_of_a_grade(tmp_path):
    study = load(tmp_path, sparsities=[0.9])
    lost = lambda c: c.method == "bcs"  # noqa: E731
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct, skip=lost).write()
    first, second = (cell for cell in study.cells() if lost(cell))
    read = dataclasses.replace(
        tidy.read(layout.root), failures=pd.DataFrame([vars(first) | {"reason": "no <memory>"}])
    )
    material = summary.make_material(study, layout, read)
    shown = {network["title"]: network for network in sections.networks(material)}
    failed, missing = (shown[f"BCS 90 %, seed {cell.seed}"] for cell in (first, second))
    assert (failed["grade"], failed["lacks"]) == ("failed", "no <memory>")
    assert (missing["grade"], missing["lacks"]) == ("no result yet", "no result yet")
    assert shown["LWM 90 %, seed 0"]["lacks"] == ""
    [group] = tidy.groups(study)
    table = sections.main_table(material, group)
    assert set(table.Reliability[table.Method == "BCS"]) == {"failed"}
    assert set(table.Reliability[table.Method != "BCS"]) == {"fine"}
    none = dataclasses.replace(material.tidy, failures=read.failures.iloc[:0])
    table = sections.main_table(summary.make_material(study, layout, none), group)
    assert set(table.Reliability[table.Method == "BCS"]) == {"no result yet"}
    written = report._graded(material.summary).set_index("method").reliability
    assert (set(written["bcs"]), set(written["lwm"])) == ({""}, {"fine"})
    assert 'class="grade failed">failed</span>' in page.page(material, {})


def test_settings_of_an_external_model_are_not_those_of_a_training(tmp_path):
    path = tmp_path / "made_up.yaml"
    theirs = {"dataset": "digits", "objective": "trades", "callable": "nets:build"}
    path.write_text(yaml.safe_dump(STUDY | {"models": {"theirs": theirs}}))
    study = loading.load(path)
    cells = {cell.method: cell for cell in study.cells()}
    shown = {
        m: yaml.safe_load(sections._settings(SimpleNamespace(study=study), c))
        for m, c in cells.items()
    }
    assert [*shown["theirs"]] == ["model"]
    assert shown["theirs"]["model"]["callable"] == "nets:build"
    assert {"method", "training"} < set(shown["bcs"])


def test_a_digest_of_digits_is_printed_as_it_is(layout):
    first = tidy.read(layout.root).results.iloc[0]
    shown = sections._known(first, sections._PROVENANCE)
    assert shown["checksum of data"] == "1" * 16


def test_reasons_have_their_grades(html):
    part = html[html.index('<section id="checks">') : html.index('<section id="images">')]
    assert part.count(f"<li>{REASON} (look)</li>") == 18  # 9 networks with results, 2 selections
    assert '<span class="grade look">look</span> LWM 90 %, seed 0, best_val' in part


def test_text_of_a_study_is_escaped(tmp_path):
    path = tmp_path / "made_up.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"title": "A <script>alert(1)</script> title"}))
    study = loading.load(path)
    layout = MadeUp(study, Layout(tmp_path / "made_up"), correct).write()
    material = summary.make_material(study, layout, tidy.read(layout.root))
    text = page.page(material, {})
    assert "<script>alert" not in text
    assert "A &lt;script&gt;alert(1)&lt;/script&gt; title" in text


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("82.2 ± 1.1 †", "82.2"),
        ("**82.2 ± 1.1**", "82.2"),
        ("−1.5 [−27.0, +24.0]", "-1.5"),
        ("55,896", "55896"),
        ("< 0.001", "0.001"),
        ("n/a", "-1e12"),
        ("failed §", "-1e12"),
        ("best_val", ""),
    ],
)
def test_numbers_are_sorted_as_numbers(text, order):
    assert sections._field(text).order == order
    assert sections._field(text).bold == text.startswith("**")


def test_small_curves_run_from_the_first_to_the_last_epoch():
    assert (
        vectors.points([0.0, 0.5, float("nan"), 1.0], 300, 100) == "0.0,100.0 100.0,50.0 300.0,0.0"
    )


def test_svg_follows_the_theme_and_names_methods(layout):
    study = load(layout.root.parent)
    material = summary.make_material(study, layout, tidy.read(layout.root))
    with style.applied():
        text = vectors.inline(style.svg(finals.robust_accuracy(material), "x"), "A title")
    assert text.startswith('<svg class="themed" role="img" aria-label="A title"')
    assert 'data-method="bcs"' in text
    assert "var(--ink)" in text
    assert "#000000" not in text
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert set(re.findall(r' id="([^"]+)"', text)) == used


# ------------------------------------------------------------------ in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page is not tested in a browser")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is missing: the page is not tested in a browser"
    )
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, layout):
    """visit(width, scheme) -> the page in a window; nothing may be wrong in its console."""
    wrong, windows = [], []

    def visit(width=1280, scheme="light"):
        window = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        windows.append(window)
        window.set_default_timeout(120_000)
        window.on("console", lambda text: wrong.append(text.text))
        window.on("pageerror", lambda error: wrong.append(str(error)))
        window.on("request", lambda r: wrong.append(r.url) if r.url.startswith("http") else None)
        window.goto((layout.root / PAGE).as_uri())
        window.wait_for_selector("html[data-ready=true]")
        return window

    yield visit
    for window in windows:
        window.close()
    assert wrong == []


def column(window, name: str) -> list[str]:
    """The visible fields of a column of the first table."""
    table = window.locator("#results table").first
    names = [text.strip() for text in table.locator("thead th").all_inner_texts()]
    rows = table.locator("tbody tr:visible")
    return rows.locator(f"td:nth-child({names.index(name) + 1})").all_inner_texts()


def numbers(window) -> list[float]:
    return [float(text.split()[0]) for text in column(window, "Clean (%)")]


def test_rows_are_sorted_by_mouse_and_keyboard(visit):
    window = visit()
    before = numbers(window)
    assert len(before) == 10
    assert before != sorted(before)
    head = window.locator("#results table thead th", has_text="Clean").first
    head.click()
    assert numbers(window) == sorted(before)
    head.locator("[tabindex='0']").first.focus()
    window.keyboard.press("Enter")
    assert numbers(window) == sorted(before, reverse=True)


def test_rows_are_filtered_by_text_and_by_method(visit):
    window = visit()
    window.locator("#results input[type=search]").first.fill("bcs 95")
    assert column(window, "Method") == ["BCS", "BCS"]
    assert column(window, "Sparsity") == ["95 %", "95 %"]
    window.locator("#results input[type=search]").first.fill("")
    assert len(column(window, "Method")) == 10
    shown = window.locator("#plot-robust_accuracy .wide [data-method=lwm]:visible")
    assert shown.count() > 0
    window.locator("#picker input[value=lwm]").focus()
    window.keyboard.press("Space")
    assert set(column(window, "Method")) == {"Dense", "BCS"}
    assert shown.count() == 0
    window.get_by_role("button", name="None").click()
    assert column(window, "Method") == []
    window.get_by_role("button", name="All").click()
    assert len(column(window, "Method")) == 10


def test_page_is_light_or_dark(visit):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = visit(scheme="light"), visit(scheme="dark")
    assert light.evaluate(ground) == "rgb(255, 255, 255)"
    assert dark.evaluate(ground) == "rgb(23, 24, 26)"
    light.locator("#theme").click()
    assert light.evaluate(ground) == dark.evaluate(ground)


@pytest.mark.parametrize(("width", "kind"), [(1280, "wide"), (390, "narrow")])
def test_page_fits_its_window(visit, width, kind):
    window = visit(width)
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("wide", "narrow"):
        visible = window.locator(f"#plot-pareto .{name}").is_visible()
        assert visible == (name == kind)


def test_a_network_opens_by_keyboard_and_by_its_address(visit):
    window = visit()
    first = window.locator(".network").first
    first.locator("summary").focus()
    window.keyboard.press("Enter")
    assert first.locator("pre").is_visible()
    last = window.locator(".network").last
    assert not last.locator("pre").is_visible()
    window.evaluate("location.hash = document.querySelector('.network:last-of-type').id")
    last.locator("pre").wait_for(state="visible")
