"""What tools read about the project: version, citation, licence, hooks."""

import datetime
import re
import tomllib

import yaml

import gemma4_tpu
from tests.house.scripts import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", gemma4_tpu.__version__)


def test_the_citation_is_valid():
    """The keys that the Citation File Format 1.2 requires, and those that must agree with others."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["type"] == "software"
    assert citation["title"].startswith(PROJECT["name"])
    assert all("name" in author or {"family-names", "given-names"} <= set(author) for author in citation["authors"])
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["version"] == gemma4_tpu.__version__
    assert all(isinstance(word, str) for word in citation["keywords"])
    assert isinstance(citation.get("date-released", datetime.date.today()), datetime.date)
    known = {"cff-version", "message", "type", "title", "abstract", "authors", "version", "license", "keywords",
             "date-released", "doi", "url", "repository-code", "references", "preferred-citation"}  # fmt: skip
    assert set(citation) <= known


def test_licence_and_attributions_travel():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert PROJECT["license-files"] == ["LICENSE", "NOTICE"]
    for asset in (ROOT / "gemma4_tpu/assets").iterdir():
        if asset.name[0] not in "_.":
            assert asset.name.removesuffix(".py") in notice, f"NOTICE says nothing of {asset.name}"


def test_the_hook_is_what_ci_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = hooks["repos"]
    assert repository["repo"] == "local"  # no network, no second set of versions
    (hook,) = repository["hooks"]
    assert hook["entry"] == "make check" and hook["language"] == "system"
    assert re.search(r"^make check$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M)
