"""REST: one router per resource, over the services."""
