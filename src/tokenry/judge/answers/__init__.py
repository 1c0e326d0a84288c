"""answers: choosing among answers, and pairs of them."""
