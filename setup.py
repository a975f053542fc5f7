"""Build: `kernels/` and `export/` install as `bcos_rt.kernels` and `bcos_rt.export`; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

packages = find_packages(include=["bcos_rt", "bcos_rt.*"])
for root, name in (("kernels", "bcos_rt.kernels"), ("export", "bcos_rt.export")):
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(root))]

setup(packages=packages, package_dir={"bcos_rt.kernels": "kernels", "bcos_rt.export": "export"})
