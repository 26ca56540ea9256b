import subprocess
import sys

import pytest

import qrpo


def test_every_public_name_can_be_imported():
    for name in qrpo.__all__:
        assert getattr(qrpo, name).__name__ == name


def test_importing_the_package_loads_neither_torch_nor_prefect():
    code = "import qrpo, sys; assert not {'torch', 'transformers', 'prefect', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_importing_the_method_never_loads_prefect_or_vllm():
    code = "import sys; from qrpo import *; assert not {'prefect', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
