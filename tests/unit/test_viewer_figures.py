"""Figures, pages and assets: pure, registered, and in one set of colours."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import kvtrace_viewer.pages
from kvtrace_viewer.figures.budget_curve import budget_curve
from kvtrace_viewer.figures.graph import LOCAL_ONLY_CONFIG, graph
from kvtrace_viewer.figures.retained_mass import MassSeries, retained_mass
from kvtrace_viewer.figures.theme import INKS

ASSETS = Path(kvtrace_viewer.pages.__file__).parents[1] / "assets"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_retained_mass_is_plain_json_with_a_line_a_policy(scheme: str) -> None:
    series = [MassSeries("h2o · 25%", [5, 6, 7], [0.9, None, 0.7]), MassSeries("lru", [5], [0.5])]
    figure = retained_mass(series, 20, scheme)
    json.dumps(figure, allow_nan=False)
    assert [line["name"] for line in figure["data"]] == ["h2o · 25%", "lru"]
    assert len({line["line"]["dash"] for line in figure["data"]}) == 2
    assert figure["layout"]["xaxis"]["range"] == [5, 19]
    # A bare string is refused by plotly 6 and later.
    assert set(figure["layout"]["xaxis"]["title"]) >= {"text"}


def test_retained_mass_says_when_nothing_was_measured() -> None:
    notes = [
        retained_mass(series, 4)["layout"]["annotations"][0]["text"]
        for series in ([], [MassSeries("full", [], [])])
    ]
    assert notes == ["No replay is chosen.", "No row follows the first cut."]


def replayed(policy: str, budget: str, mass: float | None, **more: object) -> dict[str, object]:
    row = {"policy": policy, "budget": budget, "retained_mass": mass, "bound_scope": "head"}
    bounds = dict.fromkeys(("bound", "bound_layer", "bound_model"))
    return row | bounds | {"decide_when": "step"} | more


def test_a_curve_is_a_line_a_policy_over_its_budgets() -> None:
    rows = [
        replayed("lru", "50%", 0.9),
        replayed("lru", "5%", 0.5),
        replayed("h2o", "5%", 0.6),
        replayed("h2o", "50%", 0.95),
        replayed("tova", "25%", 0.8),
        replayed("snapkv", "5%", None),
        replayed("oracle", "5%", 0.7, bound=0.75, bound_layer=0.78, bound_model=0.8),
        replayed("oracle", "50%", 0.98, bound=0.99, bound_layer=0.99, bound_model=1.0),
        replayed("lru", "128", 0.7),
    ]
    figure = budget_curve(rows, "dark")
    assert figure is not None
    json.dumps(figure, allow_nan=False)
    found = {line["name"]: list(zip(line["x"], line["y"], strict=True)) for line in figure["data"]}
    assert list(found) == ["oracle", "h2o", "lru", "bound"]
    assert found["lru"] == [(5.0, 0.5), (50.0, 0.9)]
    assert found["bound"] == [(5.0, 0.75), (50.0, 0.99)]
    figure = budget_curve([*rows, replayed("cake", "5%", 0.79, bound_scope="model")])
    assert figure is not None
    assert [line["name"] for line in figure["data"]][-2:] == ["bound", "bound, all layers together"]


def test_one_budget_is_no_curve_and_rhythms_are_told_apart() -> None:
    one = replayed("lru", "5%", 0.5)
    assert budget_curve([one, replayed("h2o", "10%", 0.5)]) is None
    again = [one, replayed("lru", "9%", 0.6)]
    also = [row | {"decide_when": "prefill"} for row in again]
    figure = budget_curve([*again, *also])
    assert figure is not None
    assert {line["name"] for line in figure["data"]} == {"lru · step", "lru · prefill"}


def test_graphs_stay_on_this_machine() -> None:
    config = graph("any", {}).config
    assert config["showSendToCloud"] is False
    assert config["plotlyServerURL"] == ""
    assert config["displaylogo"] is False
    assert LOCAL_ONLY_CONFIG.items() <= config.items()


def test_graphs_are_made_in_one_place() -> None:
    package = ASSETS.parent
    makers = [path for path in package.rglob("*.py") if "dcc.Graph(" in path.read_text()]
    assert [path.relative_to(package).as_posix() for path in makers] == ["figures/graph.py"]


def test_every_page_file_is_registered() -> None:
    folder = Path(kvtrace_viewer.pages.__file__).parent
    files = {name for _, name, _ in pkgutil.iter_modules([str(folder)])} - {"common"}
    modules = {importlib.import_module(f"kvtrace_viewer.pages.{name}") for name in files}
    assert modules == set(kvtrace_viewer.pages.PAGES)


def test_figures_and_pages_share_their_colours() -> None:
    css = (ASSETS / "tokens.css").read_text()
    blocks = {"light": css.split("}")[0], "dark": css.split("}")[1]}
    names = {"text": "text", "muted": "muted", "surface": "surface", "grid": "border"}
    for scheme, ink in INKS.items():
        tokens = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", blocks[scheme]))
        for field, token in names.items():
            assert getattr(ink, field) == tokens[token], (scheme, field)


def test_both_schemes_define_the_same_tokens() -> None:
    css = (ASSETS / "tokens.css").read_text()
    light, dark = (set(re.findall(r"--([a-z0-9-]+):", block)) for block in css.split("}")[:2])
    assert light == dark


def test_assets_name_no_other_host() -> None:
    for path in ASSETS.iterdir():
        hosts = set(re.findall(r"https?://([^/'\"\s]+)", path.read_text()))
        # The namespace of SVG is a name, never fetched.
        assert hosts <= {"www.w3.org"}, path.name


def test_the_inverse_scales_are_the_servers_own() -> None:
    """The colour bar's ticks stand where the server's codes put those weights."""
    text = (ASSETS / "palette.js").read_text()
    assert set(re.findall(r"^        (\w+): \{ ?(?:ticks)?", text, re.M)) == {
        "linear",
        "sqrt",
        "log",
    }
    assert "LOG_DECADES = 5" in text
