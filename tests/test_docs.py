"""The Python of the pages in docs/ runs, block after block; the registries stay as they were."""

import re
from pathlib import Path

import pytest

from causal_jax.attention import attention
from causal_jax.data.tasks import tasks
from causal_jax.memory import memories
from causal_jax.objectives import objectives
from causal_jax.papers import papers

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.fixture
def registries():
    kinds = attention, tasks, memories, objectives, papers
    before = [(r, r.names(), dict(r._classes), dict(r._cases)) for r in kinds]
    yield
    for registry, _, classes, cases in before:
        registry._classes, registry._cases = classes, cases


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
@pytest.mark.usefixtures("registries")
def test_the_code_of_a_page_runs(page):
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    space = {"__name__": f"docs_{page.stem}"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), space)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_and_paths_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([\w./-]+\.md)\)", text):
        assert (page.parent / target).exists(), target
    root = page.parents[1]
    for path in re.findall(r"`((?:causal_jax|tests|configs|colab)/[\w/.]+)`", text):
        assert (root / path).exists(), path
