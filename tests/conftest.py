"""What holds for all tests."""

from hypothesis import settings

# The machine is shared by several processes of tests: how long one example takes says nothing. pytest bounds each test.
settings.register_profile("mmd", deadline=None)
settings.load_profile("mmd")
