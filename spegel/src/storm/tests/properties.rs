//! What must hold whatever the network does.

use std::time::Duration;

use proptest::prelude::*;

use super::net::{Net, Weather};

const LONG: Duration = Duration::from_secs(40);

/// A network that may be as bad as networks are, in which, however, of two messages one arrives.
fn fair() -> impl Strategy<Value = Weather> {
    let misfortunes = (0_usize..3, 0_usize..2, 0_u32..4);
    (any::<u64>(), 2_usize..9, 0_u32..40, 0_u32..40, 0_u64..120, 0..40, misfortunes).prop_map(
        |(seed, nodes, lost, doubled, delay, skew, (deaths, refused, breaks))| Weather {
            seed,
            nodes,
            lost,
            doubled,
            fair: true,
            delay: Duration::from_millis(delay),
            later: Duration::from_secs(5),
            skew,
            deaths,
            refused,
            breaks,
            hostile: false,
            max_wait: Duration::from_secs(2),
        },
    )
}

/// One that may lose everything.
fn any_weather() -> impl Strategy<Value = Weather> {
    (fair(), 0_u32..=100, 0_u64..1500, 0_usize..6, 0_u64..4000).prop_map(|(weather, lost, delay, deaths, max_wait)| {
        Weather {
            lost,
            fair: false,
            delay: Duration::from_millis(delay),
            deaths,
            max_wait: Duration::from_millis(max_wait),
            ..weather
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Nobody is told to pull beside a root that has made progress for longer than the lease; nobody gets a blob from one whom it gives
    /// it to; nobody is held beyond its bound; and all end.
    #[test]
    fn a_storm_in_a_fair_network(weather in fair()) {
        let mut net = Net::new(weather);
        net.run(LONG).map_err(TestCaseError::fail)?;
        prop_assert!(net.is_over(), "some have not got it");
    }

    /// The latter three hold in any network.
    #[test]
    fn a_storm_in_any_network(weather in any_weather()) {
        let mut net = Net::new(weather);
        if let Err(error) = net.run(LONG) {
            prop_assert!(error.contains("is told to pull while"), "{}", error);
        }
    }

    /// Nobody gets a blob from one whom it gives it to, and nobody is held beyond its bound, whatever coordinators say.
    #[test]
    fn a_storm_in_which_coordinators_lie(weather in any_weather()) {
        let mut net = Net::new(Weather { hostile: true, ..weather });
        if let Err(error) = net.run(LONG) {
            prop_assert!(error.contains("is told to pull while"), "{}", error);
        }
    }
}

/// Without misfortune one pulls, and nobody gives up: what the properties are tried on is a storm.
#[test]
fn a_storm_in_a_good_network_has_one_root() {
    for seed in 0..20 {
        let mut net = Net::new(Weather {
            seed,
            nodes: 8,
            lost: 0,
            doubled: 10,
            fair: true,
            delay: Duration::from_millis(2),
            later: Duration::from_secs(5),
            skew: 5,
            deaths: 0,
            refused: 0,
            breaks: 0,
            hostile: false,
            max_wait: Duration::from_secs(2),
        });
        net.run(LONG).expect("nothing that must not be");
        assert!(net.is_over());
        assert_eq!((net.leases, net.given_up, net.from_peers), (1, 0, 7), "seed {seed}");
    }
}
