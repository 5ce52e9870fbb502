"""The versions that are installed go together, also where a package tells its needs only when it runs."""

from importlib.metadata import distributions, version

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from transformers.integrations import peft as transformers_peft

from tests.helpers.bounds import at_its_lowest, canonical, requirements


def test_transformers_takes_the_peft_that_is_allowed():
    """Its `add_adapter` asks at run time, and pip does not know."""
    assert Version(version("peft")) >= Version(transformers_peft.MIN_PEFT_VERSION)


def test_what_is_installed_is_within_the_bounds():
    base, extras = requirements()
    there = {canonical(found.name) for found in distributions()}
    for requirement in [*base, *(extra for extra in extras if canonical(extra.name) in there)]:
        found = version(requirement.name)
        assert requirement.specifier.contains(found, prereleases=True), f"{requirement}: {found} is installed"


def test_every_dependency_has_a_lowest_version():
    base, extras = requirements()
    for requirement in base + extras:
        assert at_its_lowest(requirement).startswith(requirement.name)
    assert at_its_lowest(Requirement("torch>=2.10")) == "torch==2.10.*"
    assert at_its_lowest(Requirement("transformers>=5,<6")) == "transformers==5.0.*"
    assert at_its_lowest(Requirement("setuptools>=77.0.3")) == "setuptools==77.0.3"
    assert canonical("Typing_Extensions") == "typing-extensions"
    with pytest.raises(ValueError, match="torch<3 has no lower bound; give one"):
        at_its_lowest(Requirement("torch<3"))
