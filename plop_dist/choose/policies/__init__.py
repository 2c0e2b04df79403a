"""The policies that come with the package, each an object that registry.POLICIES names."""
