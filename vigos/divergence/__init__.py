"""The loss: token-level divergences over the whole vocabulary, and the engines that compute them."""
