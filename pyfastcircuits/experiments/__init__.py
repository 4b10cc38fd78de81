"""What is taken out of a run or put into it, and measured."""
