"""What `config_checks.validate` calls: ranges, keys that nothing reads, and parts of a config."""
