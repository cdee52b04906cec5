"""The partition problem in numbers: atoms, nets and stages; knows no graph and no cluster."""
