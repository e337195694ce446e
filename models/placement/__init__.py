"""Where a model's weights lie: device maps with offloading, and models whose parts lie on several devices."""
