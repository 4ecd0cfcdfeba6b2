package main

import (
	"reflect"
	"testing"
)

func TestShares(t *testing.T) {
	functions, packages := shares(`
  20.00%  [k] tcp_sendmsg
  10.50%  [.] github.com/a/b/v2.(*T).F
   9.50%  [.] github.com/a/b/v2.G[go.shape.int/x]
   5.00%  [.] runtime.mallocgc
   1.00%  [k] tcp_recvmsg
nonsense
`)
	if want := (share{"kernel: tcp_sendmsg", 20}); len(functions) != 5 || functions[0] != want {
		t.Errorf("functions %v", functions)
	}
	if want := []share{{"kernel", 21}, {"github.com/a/b/v2", 20}, {"runtime", 5}}; !reflect.DeepEqual(packages, want) {
		t.Errorf("packages %v, want %v", packages, want)
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{3, 1}, 2}, {[]float64{9, 1, 2}, 2}} {
		if got := median(c.in); got != c.want {
			t.Errorf("median(%v) = %v, want %v", c.in, got, c.want)
		}
	}
}
