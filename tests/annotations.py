"""What checks the package's annotations while tests run, see conftest.py."""

from typing import Any, Literal, get_args, get_origin

from beartype import BeartypeConf, beartype

# As PEP 484 says, an int will do for a float.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """What jaxtyping is to call: ``function`` with its annotations checked, or as it is.

    Arguments and result are checked together, after the call. Jaxtyping would check the arguments alone
    before it, too, and so hide the package's own errors, which say what to do; that check's function returns
    `Any`. Names to choose from (`Literal`) are left to those errors, which may come from deeper down.

    Constructors stay unchecked: those of Flax's layers have types that can't be checked, and JAX makes nodes
    of its trees with other things than arrays.
    """
    hints = function.__annotations__
    if hints.get("return") is Any or function.__name__ == "__init__":
        return function
    says_something = {name: hint for name, hint in hints.items() if hint is not Any and not _has_choice(hint)}
    function.__annotations__ = says_something
    return _check(function) if says_something else function


def _has_choice(hint):
    return get_origin(hint) is Literal or any(map(_has_choice, get_args(hint)))
