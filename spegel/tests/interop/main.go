// A peer on go-libp2p and go-libp2p-kad-dht, as the nodes that spegel shares a network with are built: the same protocol
// prefix, keys and defaults. The tests drive it over its standard input, a command a line, and read its standard output.
//
//	connect MULTIADDRESS      "connected", or "error REASON"
//	provide KEY...            tells the network that this node has the keys, one walk each; "provided N"
//	sweep FIRST COUNT         the same for keys "sha256:%064x", many at once by regions of the key space; "swept COUNT"
//	find KEY                  "found ID ADDRESS,ADDRESS..." for each provider, then "end"
//	stored KEY                the same, of what this node was told itself
//	peers                     "peers N", as many as its routing table has
//
// It ends with its standard input.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ipfs/go-cid"
	"github.com/libp2p/go-libp2p"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p-kad-dht/provider"
	"github.com/libp2p/go-libp2p-kad-dht/records"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/pnet"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	tls "github.com/libp2p/go-libp2p/p2p/security/tls"
	multiaddr "github.com/multiformats/go-multiaddr"
	mh "github.com/multiformats/go-multihash"
)

const commandTimeout = 30 * time.Second

type node struct {
	host  host.Host
	dht   *dht.IpfsDHT
	sweep *provider.SweepingProvider
}

func main() {
	listen := flag.String("listen", "", "multiaddress to listen on")
	security := flag.String("security", "both", "noise, tls or both")
	seed := flag.String("seed", "", "text that makes the identity")
	maxAge := flag.Duration("max-age", 19*time.Minute, "how long records of others are valid")
	networkKey := flag.String("network-key-file", "", "key file of a private network")
	flag.Parse()
	if err := run(*listen, *security, *seed, *networkKey, *maxAge); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(listen, security, seed, networkKey string, maxAge time.Duration) error {
	n, err := start(listen, security, seed, networkKey, maxAge)
	if err != nil {
		return err
	}
	fmt.Println("ready", n.host.ID())
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) == 0 {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
		if err := n.do(ctx, words[0], words[1:]); err != nil {
			fmt.Println("error", err)
		}
		cancel()
	}
	return lines.Err()
}

func start(listen, security, seed, networkKey string, maxAge time.Duration) (*node, error) {
	key, err := identity(seed)
	if err != nil {
		return nil, err
	}
	options := []libp2p.Option{libp2p.ListenAddrStrings(listen), libp2p.Identity(key), libp2p.DisableRelay()}
	switch security {
	case "noise":
		options = append(options, libp2p.Security(noise.ID, noise.New))
	case "tls":
		options = append(options, libp2p.Security(tls.ID, tls.New))
	}
	if networkKey != "" {
		file, err := os.Open(networkKey)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		psk, err := pnet.DecodeV1PSK(file)
		if err != nil {
			return nil, err
		}
		options = append(options, libp2p.PrivateNetwork(psk))
	}
	h, err := libp2p.New(options...)
	if err != nil {
		return nil, err
	}
	d, err := dht.New(
		h,
		dht.Mode(dht.ModeServer), dht.ProtocolPrefix("/spegel"), dht.DisableValues(),
		dht.ProviderManagerOpts(records.ProvideValidity(maxAge)),
	)
	if err != nil {
		return nil, err
	}
	return &node{host: h, dht: d}, nil
}

// As large a part of the hash as the key needs, repeated as its reader asks for it.
func identity(seed string) (crypto.PrivKey, error) {
	sum := sha256.Sum256([]byte(seed))
	key, _, err := crypto.GenerateEd25519Key(io.LimitReader(strings.NewReader(strings.Repeat(string(sum[:]), 4)), 128))
	return key, err
}

func (n *node) do(ctx context.Context, command string, words []string) error {
	switch command {
	case "connect":
		return n.connect(ctx, words[0])
	case "provide":
		return n.provide(ctx, words)
	case "sweep":
		return n.provideByRegion(words[0], words[1])
	case "find":
		for found := range n.dht.FindProvidersAsync(ctx, cid.NewCidV1(cid.Raw, hash(words[0])), 0) {
			show(found)
		}
		fmt.Println("end")
	case "stored":
		found, err := n.dht.ProviderStore().GetProviders(ctx, hash(words[0]))
		if err != nil {
			return err
		}
		for _, one := range found {
			show(one)
		}
		fmt.Println("end")
	case "peers":
		fmt.Println("peers", n.dht.RoutingTable().Size())
	default:
		return fmt.Errorf("no such command: %s", command)
	}
	return nil
}

func (n *node) connect(ctx context.Context, address string) error {
	info, err := peer.AddrInfoFromString(address)
	if err != nil {
		return err
	}
	if err := n.host.Connect(ctx, *info); err != nil {
		return err
	}
	fmt.Println("connected")
	return nil
}

func (n *node) provide(ctx context.Context, keys []string) error {
	errs := make(chan error, len(keys))
	var all sync.WaitGroup
	for _, key := range keys {
		all.Go(func() { errs <- n.dht.Provide(ctx, cid.NewCidV1(cid.Raw, hash(key)), true) })
	}
	all.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			return err
		}
	}
	fmt.Println("provided", len(keys))
	return nil
}

func (n *node) provideByRegion(firstWord, countWord string) error {
	first, err := strconv.Atoi(firstWord)
	if err != nil {
		return err
	}
	count, err := strconv.Atoi(countWord)
	if err != nil {
		return err
	}
	if n.sweep == nil {
		n.sweep, err = provider.New(
			provider.WithHost(n.host), provider.WithRouter(n.dht), provider.WithMessageSender(n.dht.MessageSender()),
			provider.WithSelfAddrs(n.host.Addrs), provider.WithReprovideInterval(15*time.Minute),
			provider.WithMaxReprovideDelay(time.Minute),
			provider.WithAddLocalRecord(func(ctx context.Context, key mh.Multihash) error {
				return n.dht.ProviderStore().AddProvider(ctx, key, peer.AddrInfo{ID: n.host.ID()})
			}),
		)
		if err != nil {
			return err
		}
	}
	keys := make([]mh.Multihash, 0, count)
	for i := range count {
		keys = append(keys, hash(fmt.Sprintf("sha256:%064x", first+i)))
	}
	// It is offline until it has looked for the first time.
	deadline := time.Now().Add(commandTimeout)
	for {
		err = n.sweep.StartProviding(true, keys...)
		if err == nil || time.Now().After(deadline) {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	fmt.Println("swept", count)
	return nil
}

// The key's CIDv1 is of raw bytes with a sha2-256 multihash of the key's text.
func hash(key string) mh.Multihash {
	sum, err := mh.Sum([]byte(key), mh.SHA2_256, -1)
	if err != nil {
		panic(err)
	}
	return sum
}

func show(info peer.AddrInfo) {
	addresses := make([]string, 0, len(info.Addrs))
	for _, address := range info.Addrs {
		addresses = append(addresses, multiaddr.Cast(address.Bytes()).String())
	}
	fmt.Println("found", info.ID, strings.Join(addresses, ","))
}
