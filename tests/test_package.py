import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import pyro_vae

MODULES = [module.name for module in pkgutil.walk_packages(pyro_vae.__path__, "pyro_vae.") if "__main__" not in module.name]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs=vars(pyro_vae) | {"torch": importlib.import_module("torch")}).failed == 0


def test_import_is_light_and_changes_nothing():
    code = """
import random, sys
import numpy, pyro, torch
before = torch.random.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), random.getstate()
numpy_state = numpy.random.get_state()[1].tolist()
validation = pyro.settings.get()
import pyro_vae
assert not {"torchvision", "matplotlib", "sklearn", "scipy"} & set(sys.modules), "heavy imports"
after = torch.random.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), random.getstate()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
assert numpy.random.get_state()[1].tolist() == numpy_state
assert pyro.settings.get() == validation
assert not pyro.get_param_store().keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_names_exist_and_are_documented():
    for name in pyro_vae.__all__:
        thing = getattr(pyro_vae, name)
        assert thing.__doc__, name
