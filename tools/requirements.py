"""Print what a development environment installs from PyPI, a line each: pyproject.toml says it once."""

import tomllib

with open("pyproject.toml", "rb") as file:
    pyproject = tomllib.load(file)
project = pyproject["project"]
print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")
