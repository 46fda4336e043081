"""The checks on a config: `config_checks.validate`, ranges, keys that nothing reads, and parts."""
