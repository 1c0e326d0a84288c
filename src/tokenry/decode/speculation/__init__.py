"""speculation: drafters, draft trees, verifiers, and the loop that drafts."""
