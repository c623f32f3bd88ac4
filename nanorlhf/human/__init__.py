"""People who judge: what they are asked, what they have said, and the page between."""
