"""People who judge: what they are asked, their answers, and the pages on which they give them."""
