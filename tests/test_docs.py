"""The guides' code is run as it stands, on smaller nets and fewer epochs; the reference has every public name."""

import pathlib
import re

import keras
import numpy as np
import pytest

import kerascompress as kc

DOCS = pathlib.Path(__file__).parents[1] / "docs"
GUIDES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text()]
SMALLER = {
    "models.resnet20(num_classes=10)": "models.resnet(8, 10, width=4)",
    "extra_blocks=10": "extra_blocks=1",
    "epochs, batch_size = 200, 128": "epochs, batch_size = 1, 16",
    "[4, 9, 14, 22], seeds=[0, 1, 2]": "[4], seeds=[0]",
}


@pytest.mark.once
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_runs(page, tmp_path, monkeypatch, capsys):
    code = "".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    for theirs, smaller in SMALLER.items():
        code = code.replace(theirs, smaller)
    assert "200" not in code
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    downloaded = rng.integers(0, 256, (40, 32, 32, 3), "uint8"), rng.integers(0, 10, (40, 1), "uint8")
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: (downloaded, downloaded))
    exec(compile(code, page.name, "exec"), {"__name__": "__main__"})
    promised = [float(number) for number in re.findall(r"^print\(.*#(?: still)? ([\d.]+)$", code, re.MULTILINE)]
    printed = [float(line) for line in capsys.readouterr().out.splitlines() if re.fullmatch(r"\d\.\d+", line)]
    assert printed == pytest.approx(promised, abs=2e-3)


@pytest.mark.once
def test_the_reference_has_every_public_name():
    named = set(
        re.findall(r"^\.\. (?:auto)?(?:class|function):: (\w+)", (DOCS / "reference.md").read_text(), re.MULTILINE)
    )
    assert named | {"models"} >= set(kc.__all__)
