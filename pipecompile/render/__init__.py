"""Drawings of stage graphs and timelines: terminal, Mermaid, Graphviz, SVG, HTML, JSON."""
