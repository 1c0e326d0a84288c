"""Quality of translations: constrained search, tags, severities, phrases, and an estimator that learns from them."""
