"""The README's code is run as it stands, on a smaller net and fewer epochs."""

import pathlib
import re

import keras
import numpy as np
import pytest

import kerascompress as kc

README = pathlib.Path(__file__).parent.parent / "README.md"


class Subclassed(keras.Model):
    """In place of a vision transformer: a model whose layers nobody can replace."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.head = keras.layers.Dense(10)

    def build(self, input_shape):
        self.head.build((None, 3))

    def call(self, images):
        return self.head(keras.ops.mean(keras.ops.cast(images, "float32"), axis=(1, 2)) / 255)


@pytest.mark.once
def test_the_tour_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    tour = "".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
    for theirs, smaller in {
        "models.resnet20(num_classes=10)": "models.resnet(8, 10, width=4)",
        "extra_blocks=10": "extra_blocks=1",
        "epochs=200": "epochs=1",
        "batch_size=128": "batch_size=4",
        "end_step=20_000, frequency=100": "end_step=8, frequency=2",
    }.items():
        assert theirs in tour
        tour = tour.replace(theirs, smaller)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    downloaded = rng.integers(0, 256, (40, 32, 32, 3), "uint8"), rng.integers(0, 10, (40, 1), "uint8")
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: (downloaded, None))
    scope = {"vit": Subclassed()}
    exec(tour, scope)
    (printed,) = re.findall(r"^0\.\d+$", capsys.readouterr().out, re.MULTILINE)  # between the progress bars
    assert float(printed) == pytest.approx(0.6, abs=1e-3)
    assert float(keras.ops.convert_to_numpy(scope["augment"].magnitude)) == pytest.approx(4, abs=0.01)
    assert scope["small"].count_params() < scope["large"].count_params()
    assert scope["distiller"].optimizer.iterations == 10
    assert kc.sparsity(scope["vit"]) == pytest.approx(0.6, abs=1e-3)
    assert (tmp_path / "saved_models" / "resnet20_p60" / "saved_model.pb").exists()
