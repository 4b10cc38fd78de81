"""What tests of several suites share: inputs, oracles, the rule of accuracy. No tests."""
