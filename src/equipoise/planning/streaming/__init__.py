"""Plans that follow a stream of loads: drift, policies, what a change costs and gains."""
