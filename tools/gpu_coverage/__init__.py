"""Records which lines of the product that depend on the device are executed by the tests."""
