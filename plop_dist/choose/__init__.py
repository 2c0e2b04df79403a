"""Which modules get adapters: candidates, policies, and how sure and why the choice is."""
