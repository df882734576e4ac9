"""A wheel that holds a compiled library, though nothing is compiled while it is packed."""

from setuptools import Distribution, setup


class Compiled(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(distclass=Compiled, options={"bdist_wheel": {"py_limited_api": "cp310"}})
