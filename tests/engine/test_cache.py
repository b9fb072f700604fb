import os

import pytest
from conftest import make_vae

from pyro_vae import NegativeELBO, fit, load_data
from pyro_vae.engine.cache import ensure_cache
from pyro_vae.engine.tracing import NotCompiledWarning


def test_a_cache_that_cannot_be_written_is_said_once_and_training_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    x = load_data("digits")[0].x[:8]
    with pytest.warns(NotCompiledWarning, match="TORCHINDUCTOR_CACHE_DIR=.*file/cache: cannot be written"):
        fit(NegativeELBO(make_vae((1, 8, 8))), x, steps=1, verbose=False)
    fit(NegativeELBO(make_vae((1, 8, 8))), x, steps=1, verbose=False)
    assert os.path.isdir(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def test_a_cache_that_can_be_written_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new"))
    ensure_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
