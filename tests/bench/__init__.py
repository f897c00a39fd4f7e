"""What vllmd costs: `make bench`. Measures print their value beside a target; they fail nothing."""
