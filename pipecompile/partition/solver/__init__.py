"""The partitioning problem as numbers: atoms, nets and stages, independent of graphs and clusters."""
