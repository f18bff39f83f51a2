"""The suite itself, tested: the oracle, the cases, the plugin, and wrong backends that it must catch."""
