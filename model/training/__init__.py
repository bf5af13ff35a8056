"""The only code that knows losses and optimisers; the service never imports it."""
