"""What the tests of the zones need before they are imported."""

import pytest

# its asserts say what they compared, as those in test files do
pytest.register_assert_rewrite("context_checks")
