"""Stand-ins for the machine: time, an accelerator, a disk. Each passes the contract tests of the real thing."""
