"""Output for people: terminal, HTML pages, figures, comparisons of runs, and the table of traffic."""
