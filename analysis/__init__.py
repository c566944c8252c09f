"""Questions asked of a store, a teacher or a Raptor."""
