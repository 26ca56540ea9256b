"""One line for each thing that is refused."""

import pytest


def refuses(error, match, call, *arguments, **options):
    """Assert that the call raises this error with a message that matches; returns the error."""
    with pytest.raises(error, match=match) as raised:
        call(*arguments, **options)
    return raised.value
