"""The pages people read: a round's (from its files alone), a run's, the plots and examples in them."""
