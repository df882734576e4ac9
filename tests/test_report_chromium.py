"""Reports in a real browser: nothing of a stranger's runs, and every figure is seen in either theme and width."""

from __future__ import annotations

import io

import numpy as np
import pytest
from test_browse_web import chromium  # noqa: F401
from test_paper_report import EVIL
from test_report_kinds import BROWSER, training

from writesae.browse import sample_store
from writesae.report import collect, train


@pytest.mark.parametrize("what", ["collect", "train"])
def test_in_chromium_nothing_runs_and_all_is_seen(what, tmp_path, chromium):  # noqa: F811
    if what == "collect":
        made, _ = sample_store(tmp_path, ((0, 0), (7, 1)), 32, 8_000, context=64, dictionaries=False, hostile=True)
        page = collect.build(made, tmp_path / "out", BROWSER)
    else:
        page = train.build(training(tmp_path / "run", [f"{EVIL}/L1H1", "k8/L1H1"], model=EVIL), tmp_path / "out")
    tones = {}
    for theme, width in (("light", 1440), ("dark", 380)):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        window = context.new_page()
        said: list[str] = []

        def fetched(request, said=said):
            if not request.url.startswith(("file:", "data:")):
                said.append(request.url)

        def asked(dialog, said=said):
            said.append(dialog.message)
            dialog.dismiss()

        window.on("dialog", asked)
        window.on("console", lambda message, said=said: said.append(message.text))
        window.on("request", fetched)
        window.goto(page.as_uri())
        assert window.title() != "ran" and not said
        assert window.evaluate("document.documentElement.scrollWidth") <= width
        assert window.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 100)")
        tones[theme] = brightness(window.locator("figure img").first.screenshot())
        context.close()
    assert tones["light"] > 200 and tones["dark"] < 90


def brightness(png: bytes) -> float:
    from PIL import Image

    return float(np.asarray(Image.open(io.BytesIO(png)).convert("L")).mean())
